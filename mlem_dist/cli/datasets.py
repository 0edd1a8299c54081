"""Commands that look at datasets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from mlem_dist.cli.options import device_option, given, location, on_stop, target, target_location

if TYPE_CHECKING:
    from mlem_dist.dataset.export import ExportReport
    from mlem_dist.store import Location


@click.command()
@click.argument("dataset", type=location, metavar="OUT")
@click.option("--out", type=target, metavar="FILE", help="PNG to write.  [default: OUT/preview.png]")
def show(dataset: Location, out: Path | None) -> None:
    """Make the contact sheet of a dataset."""
    from mlem_dist import api

    click.echo(f"Wrote {api.show(dataset, out=out)}")


@click.command()
@click.argument("dataset", type=location, metavar="OUT")
@click.option("--id", type=click.IntRange(min=0), required=True, help="Sample id of the image.")
@click.option("--ladder", type=given, metavar="NAME", help="The ladder, if it is no longer where it was.")
@click.option("--out", type=target, metavar="FILE", help="PNG to write.  [default: remake-ID.png]")
@device_option
def remake(dataset: Location, **arguments: Any) -> None:
    """Make an image of a dataset again from its row, and compare.

    Writes a picture of the stored image, the remade one and ten times their difference, and prints the lines by which
    diffusers begins with the same noise.
    """
    from mlem_dist import api

    remade = api.remake(dataset, **arguments)
    for name, value in remade.row.items():
        click.echo(f"{name}: {value}")
    difference = remade.difference
    click.echo(f"Difference: {difference.mean():.3g} grey levels in the mean, {difference.max()} at most")
    click.echo(f"Wrote {remade.picture}")
    click.echo(f"By diffusers:\n{remade.lines}")


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


@click.command()
@click.argument("dataset", type=location, metavar="OUT")
@click.argument("folder", type=target_location, metavar="TARGET")
@click.option(
    "--format",
    type=click.Choice(["webdataset", "folder"]),
    required=True,
    help="webdataset is tar files as img2dataset writes them; folder is pictures with a metadata.jsonl, as ImageFolder "
    "of Hugging Face reads them.",
)
def export(dataset: Location, folder: Location, format: Literal["webdataset", "folder"]) -> None:
    """Copy a finished dataset to TARGET in the layout of another tool. The same command again finishes it."""
    on_stop("Finished files are kept; the same command goes on from there.")
    from mlem_dist import api

    click.echo(_exported(api.export(dataset, folder, format=format), format))


def _exported(report: ExportReport, format: str) -> str:
    """What an export has written, and how to read it."""
    kind = "tar file" if format == "webdataset" else "folder"
    content = f"{report.images:,} images in {report.files:,} {kind}{'s' * (report.files > 1)}"
    if not report.made:
        made = f"{report.target} is complete already: {content}"
    elif report.made < report.images:
        made = f"Wrote {report.made:,} images to {report.target}, which has all {content} now"
    else:
        made = f"Wrote {content.replace(' in ', f' to {report.target} in ')}"
    reader = "datasets.load_dataset('imagefolder', data_dir={})" if format == "folder" else "webdataset.WebDataset({})"
    return f"{made}; read it by {reader.format(repr(report.paths))}"
