"""`bitnet rm`: free the disk of a model from the Hub."""

from __future__ import annotations

import json
import sys

import click

from bitnet.cli.options import output_options


@click.command("rm", short_help="Free the disk of a model from the Hub.")
@click.argument("model", metavar="ORG/NAME")
@click.option("--revision", metavar="REV", help="Only this one: a branch, tag, or the beginning of a commit. Default: all.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@output_options
def command(model: str, revision: str | None, yes: bool, as_json: bool) -> None:
    """Free the disk of a model from the Hub, ORG/NAME as `bitnet list` shows it. Asks first at a terminal.

    The cache is shared: other programs that use the model will download it again.
    """
    from bitnet.hub.cached import removal
    from bitnet.hub.needs import size_text

    found = removal(model, revision)
    question = f"Remove {found.what} and free {size_text(found.size)}?"
    if not yes and sys.stdin.isatty() and not click.confirm(question, err=True):
        click.echo("nothing was removed", err=True)
        sys.exit(1)
    found.execute()
    click.echo(f"removed {found.what}: {found.size:,} bytes freed")
    if as_json:
        click.echo(json.dumps({"removed": found.what, "freed_bytes": found.size}))
