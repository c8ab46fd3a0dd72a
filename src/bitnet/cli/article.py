"""`bitnet-cli` and `bitnet-convert`: the article's own flags, thin doors to `bitnet run` and `bitnet convert`."""

from __future__ import annotations

from typing import Any

import click

from bitnet import __version__
from bitnet.cli.errors import Guarded
from bitnet.cli.options import EMBEDDED_MODEL, conversion_options, engine_options, generation_options, output_options
from bitnet.machine import require_numpy


@click.command("bitnet-cli", cls=Guarded, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", "source", default=EMBEDDED_MODEL, show_default=True, metavar="MODEL", help="Embedded name, folder or file.")
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


@click.command("bitnet-convert", cls=Guarded, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--input-model", "source", required=True, metavar="MODEL", help="Embedded name, folder or file.")
@click.option("--output-model", "target", required=True, metavar="TARGET", help="The folder or file to write.")
@click.option("--device", default="cpu", show_default=True, metavar="DEVICE", help="Where to compute; cpu is what there is.")
@conversion_options
@output_options
@click.version_option(__version__, prog_name="bitnet-convert")
def convert(source: str, target: str, device: str, **options: Any) -> None:
    """Write a model in another format, ternary if asked to."""
    from bitnet.cli.convert import convert_model

    if device != "cpu":
        raise click.UsageError(f"--device is {device!r}; this build converts on the cpu only")
    convert_model(source, target, **options)


def convert_main() -> None:
    """The console script `bitnet-convert`."""
    convert(prog_name="bitnet-convert")
