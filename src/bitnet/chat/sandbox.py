"""The process that renders chat templates: one JSON line in, one JSON line out, until its input ends.

A template is a program from a stranger. Fuel ends its loops and its long strings, but nothing in minijinja bounds its memory: thirty rounds
of `x = [x, x]` printed ask for gigabytes, and where the system refuses, Rust aborts the process. So it runs here, under a limit of address
space (where the system has such limits: not on Windows), and `bitnet.chat` ends it when it takes too long. Runs as a script and imports
nothing else of the package.
"""

from __future__ import annotations

import json
import signal
import sys
from datetime import datetime
from typing import Any

MEMORY_BYTES = 256 << 20  # of address space, the interpreter's own 40 MB included
FUEL = 2_000_000  # instructions, and characters that are joined; a conversation takes some ten thousand instructions
FUEL_A_CHARACTER = 64  # of the conversation: a template may copy it a few times over
MAX_OUTPUT_CHARACTERS = 16 << 20


def limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        pass


def render(source: str, variables: dict[str, Any], characters: int) -> dict[str, str]:
    """{"text": ...}, or {"refused": the template's own words}, or {"broken": the reason}."""
    import minijinja

    refusals: list[str] = []

    def raise_exception(message: object) -> None:
        refusals.append(str(message))
        raise RuntimeError("refused")

    environment = minijinja.Environment(
        filters={"tojson": tojson},
        globals={"raise_exception": raise_exception, "strftime_now": strftime_now},
        fuel=FUEL + FUEL_A_CHARACTER * characters,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_escape_callback=lambda name: False,
        debug=False,
    )
    try:
        text = environment.render_str(source, **variables)
    except Exception as error:
        if refusals:
            return {"refused": refusals[-1]}
        return {"broken": str(getattr(error, "message", error)) if isinstance(error, minijinja.TemplateError) else repr(error)}
    if len(text) > MAX_OUTPUT_CHARACTERS:
        return {"broken": f"it gives {len(text)} characters; expected at most {MAX_OUTPUT_CHARACTERS}"}
    return {"text": text}


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """As transformers defines it: no escaping for HTML, characters as they are."""
    separators = tuple(separators) if separators else None
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def main() -> None:
    sys.path.insert(0, sys.argv[1])  # the folder that holds minijinja; started with -S, which saves the search through site-packages
    import minijinja  # noqa: F401  the time of its loading belongs to the start, not to the first template

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at the terminal is meant for the one who asks
    limit_memory()
    tell({"ready": ""})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            tell(render(request["source"], request["variables"], len(line)))
        except MemoryError:
            tell({"broken": "out of memory"})


def tell(answer: dict[str, str]) -> None:
    sys.stdout.buffer.write(json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
