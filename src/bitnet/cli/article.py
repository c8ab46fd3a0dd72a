"""`bitnet-cli`: the article's own flags, a thin door to `bitnet run`."""

from __future__ import annotations

from typing import Any

import click

from bitnet import __version__
from bitnet.cli.errors import Guarded
from bitnet.cli.options import EMBEDDED_MODEL, engine_options, generation_options, output_options
from bitnet.machine import require_numpy


@click.command("bitnet-cli", cls=Guarded, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", "source", default=EMBEDDED_MODEL, show_default=True, metavar="MODEL", help="Embedded name, folder or file.")
@click.option("--tokenizer", metavar="FILE", help="A tokenizer.json. Default: the model's own.")
@click.option("--quantization", type=click.Choice(["ternary"]), default="ternary", expose_value=False, help="Ternary is what there is.")
@click.option("--ternary", is_flag=True, expose_value=False, help="The same as --quantization ternary.")
@generation_options
@engine_options
@output_options
@click.version_option(__version__, prog_name="bitnet-cli")
def cli(source: str, **options: Any) -> None:
    """Continue a prompt with a ternary model."""
    from bitnet.cli.run import continue_prompt

    require_numpy()
    continue_prompt(source, **options)


def main() -> None:
    """The console script `bitnet-cli`."""
    cli(prog_name="bitnet-cli")
