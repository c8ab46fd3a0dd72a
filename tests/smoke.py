"""What every installation must do. Needs the standard library only, so that any Python can try any wheel, in an emulator too:

    python tests/smoke.py bitnet
    python tests/smoke.py qemu-aarch64 -L sysroot sysroot/usr/bin/python3.11 -m bitnet

The arguments are what stands for the command `bitnet`. Prints one line; exit code 1 with what went wrong.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

PROMPT = "Once upon a time"
STORY = [12, 427, 301, 259, 482, 777, 1632, 1008, 14, 478, 1310, 274]  # the embedded model's greedy continuation, on every machine


def record(command: Sequence[str], **run: Any) -> dict[str, Any]:
    """The JSON object that the command ends with. Raises SystemExit, with all that it printed, if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **run)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}: {done.stdout}{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def told(*command: str, **run: Any) -> dict[str, Any]:
    """The record of the story that `command` (`bitnet run` or its like) tells. Raises SystemExit if it is another story."""
    found = record([*command, "--prompt", PROMPT, "--temperature", "0", "--max-new-tokens", str(len(STORY)), "--json"], **run)
    if found["token_ids"] != STORY:
        raise SystemExit(f"{' '.join(command)}: token ids {found['token_ids']} on {found['isa']}; expected {STORY}")
    return found


def main(*bitnet: str) -> None:
    isa = told(*bitnet, "run")["isa"]
    if len(bitnet) == 1:
        told(f"{bitnet[0]}-cli")
    machine = record([*bitnet, "doctor", "--json"])
    python = next(f["detail"] for f in machine["findings"] if f["what"] == "versions")
    sound = [f["what"].removeprefix("kernel ") for f in machine["findings"] if f["detail"] == "ok"]
    print(f"the expected story on {isa}; self-test ok for {', '.join(sound)}; {python}")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["bitnet"])
