"""Commands that look at datasets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlem_dist.cli.options import location, target

if TYPE_CHECKING:
    from mlem_dist.dataset.store import Location


@click.command()
@click.argument("dataset", type=location, metavar="OUT")
@click.option("--out", type=target, metavar="FILE", help="PNG to write.  [default: OUT/preview.png]")
def show(dataset: Location, out: Path | None) -> None:
    """Make the contact sheet of a dataset."""
    from mlem_dist import api

    click.echo(f"Wrote {api.show(dataset, out=out)}")


@click.command()
@click.argument("dataset", type=location, metavar="OUT")
def verify(dataset: Location) -> None:
    """Compare every file of a dataset with the digest recorded when it was written."""
    from mlem_dist import api

    shards, problems, finished = api.verify(dataset)
    for problem in problems:
        click.echo(problem, err=True)
    if problems:
        click.echo("Remove these files; the command that made the dataset makes its shards again.", err=True)
        sys.exit(1)
    if not finished:
        are = f"{len(shards)} shards are there and as they were written"
        click.echo(f"{dataset} is not finished: {are}; run `mlem-dist generate` again to finish it.", err=True)
        sys.exit(3)
    click.echo(f"{dataset}: all {len(shards)} shards are as they were written.")
