"""`python -m bitnet.train RECIPE ...` is `bitnet train --config RECIPE ...`."""

import sys

from bitnet.cli.train import command

if __name__ == "__main__":
    words = sys.argv[1:]
    command(["--config", *words] if words and not words[0].startswith("-") else words, prog_name="python -m bitnet.train")
