"""`bitnet list`: the models inside the package, and those in the cache of the Hugging Face Hub."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from bitnet.cli.options import output_options

if TYPE_CHECKING:
    from bitnet.hub.cached import CachedModel

HEADER = ("model", "revision", "size", "last used", "state")


@click.command("list", short_help="Show the models that are on this machine.")
@output_options
def command(as_json: bool) -> None:
    """Show the models that are on this machine: embedded ones, and those in the cache of the Hugging Face Hub.

    Other programs share the cache; what does not run here is shown too, with the reason.
    """
    from bitnet.hub import cache_folder
    from bitnet.hub.cached import cached_models

    inside, cached = embedded(), cached_models()
    rows = [HEADER, *((model["name"], "embedded", size_text(model["size"]), "", "ready") for model in inside), *map(row, cached)]
    name_width, revision_width, size_width = (max(len(cells[i]) for cells in rows) for i in range(3))
    for name, revision, size, used, state in rows:
        click.echo(f"{name:<{name_width}}  {revision:<{revision_width}}  {size:>{size_width}}  {used:>14}  {state}")
    click.echo(f"the Hub's cache: {cache_folder()}")
    if as_json:
        click.echo(json.dumps({"embedded": inside, "cached": [asdict(model) for model in cached], "cache": str(cache_folder())}))


def embedded() -> list[dict[str, Any]]:
    """Name and size in bytes of the models inside the package."""
    from bitnet.source import embedded_models, resolve

    return [{"name": name, "size": sum(p.stat().st_size for p in resolve(name).iterdir())} for name in embedded_models()]


def row(model: CachedModel) -> tuple[str, str, str, str, str]:
    """A line of the table."""
    revision = " = ".join([*model.revisions, model.commit[:8]]) if model.commit else "-"
    size = size_text(model.size) + (f" + {size_text(model.unfinished)} unfinished" if model.unfinished else "")
    used = "" if model.last_used is None else age_text(time.time() - model.last_used)
    return model.name, revision, size, used, model.state


def size_text(size_bytes: int) -> str:
    """As the downloads show it."""
    from bitnet.hub.needs import size_text as text

    return text(size_bytes)


def age_text(seconds: float) -> str:
    """How long ago, in one unit."""
    found = next(((unit, length) for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)) if seconds >= 2 * length), None)
    return f"{seconds // found[1]:.0f} {found[0]} ago" if found else "just now"
