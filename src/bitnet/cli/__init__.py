"""The command line. A command's module is imported when the command runs, so that `bitnet --help` imports click and nothing else."""

from __future__ import annotations

import importlib

import click

from bitnet import __version__
from bitnet.cli.errors import Guarded
from bitnet.machine import require_numpy

# name -> its line in `bitnet --help`; the command is `command` in bitnet.cli.<name>
COMMANDS = {
    "bench": "Measure speed against the memory bandwidth of this machine.",
    "convert": "Write a model in another format, exactly or not at all.",
    "doctor": "Check this machine, or a model: does it run right, and if not, why.",
    "eval": "Measure perplexity and bits per byte on text files.",
    "inspect": "Show what a model is made of.",
    "list": "Show the models that are on this machine.",
    "rm": "Free the disk of a model from the Hub.",
    "run": "Continue a prompt.",
    "train": "Train a model by a recipe.",
}


class LazyGroup(Guarded, click.Group):
    """A group that knows its commands by name and imports only the one that is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        require_numpy()
        found: click.Command = importlib.import_module(f"bitnet.cli.{cmd_name}").command
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.group("bitnet", cls=LazyGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="bitnet")
@click.pass_context
def cli(context: click.Context) -> None:
    """Ternary language models: run, measure and inspect them on ordinary CPUs."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(2)


def main() -> None:
    """The console script `bitnet`."""
    cli(prog_name="bitnet")
