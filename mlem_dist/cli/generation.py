"""Commands that generate datasets."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlem_dist.cli.options import (
    address_option,
    classes,
    given,
    number,
    on_stop,
    plan_options,
    say,
    size_options,
    source,
    target,
    target_location,
)

if TYPE_CHECKING:
    from mlem_dist.engine.progress import GenerationReport


@click.command()
@click.option("--num", type=number, help="Images: 1000, 1e6, 1_000_000.  [default: one for each prompt]")
@click.option(
    "--prompts",
    type=given,
    metavar="FILE",
    help="Table of prompts by path or URL: .parquet, .jsonl, .csv, or a text with a prompt in each line. Its columns "
    "negative_prompt, seed and guidance_scale are used, all others are carried into the dataset.",
)
@click.option("--prompt-column", default="prompt", show_default=True, help="The table's column of prompts.")
@click.option("--images-per-prompt", type=number, default=1, show_default=True, help="Images of each prompt.")
@click.option("--negative-prompt", "negative_prompts", metavar="TEXT", help="Negative prompt of all images.")
@click.option("--guidance", type=float, help="Scale of guidance.  [default: the ladder's]")
@click.option(
    "--out",
    type=target_location,
    metavar="FOLDER",
    required=True,
    help="Dataset folder, or its URL, such as s3://BUCKET/NAME; a rerun finishes it.",
)
@plan_options
@click.option("--plan", type=source, metavar="FILE", help="A plan of `mlem-dist draw` or `tune`, for all blocks.")
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16", "float16", "own"]),
    help="What models compute in. bfloat16 is faster on GPUs, and on CPUs that have instructions for it.  [default: "
    "own, the precision that the ladder has for each; float32 for trained ladders]",
)
@click.option(
    "--image-format",
    type=click.Choice(["png", "jpeg", "webp"]),
    default="png",
    show_default=True,
    help="Format of the images; jpeg and webp make large images small.",
)
@click.option("--image-quality", type=int, help="Quality of jpeg or webp, 1 to 100.  [default: 95]")
@click.option(
    "--score",
    "scores",
    multiple=True,
    metavar="MODULE:CLASS",
    help="Class that scores images, as Ray Data's map_batches takes them; its columns are written beside the image. "
    "Several times for several.",
)
@click.option("--keep", metavar="CONDITION", help="Rows to keep, such as 'score > 0.5 and label in (1, 2)'.")
@click.option("--until", type=number, help="Rows to keep: images are made in order until so many are kept.")
@click.option("--labels", type=classes, default="all", show_default=True, help="Classes, such as 0,3,9; balanced.")
@size_options
@click.option(
    "--placement",
    default="auto",
    show_default=True,
    help="Which levels share a pool of actors: pools (each its own), together, ranges such as 1-3,4, or auto, "
    "the fastest by prediction. Ranges may name devices: 1-3@L4,4@H100 by accelerator, 1@cpu,2-4@size=large by node "
    "label.",
)
@click.option(
    "--coalesce",
    type=number,
    default=1,
    show_default=True,
    help="Blocks that another pool than the first evaluates together, at most. More than one is for blocks too small "
    "for a device; results are then equal to rounding only.",
)
@click.option("--devices", type=number, help="CPU cores or GPUs to use.  [default: all that Ray has]")
@address_option
@click.option(
    "--engine",
    type=click.Choice(["ray", "inline"]),
    default="ray",
    show_default=True,
    help="inline is this process alone, with a thread per device.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the final report as JSON.")
@click.option(
    "--dry-run", is_flag=True, help="Make four images and dry-run.png of them, and say what the whole takes; no more."
)
def generate(as_json: bool, dry_run: bool, **arguments: Any) -> None:
    """Generate a Parquet dataset. The same command again finishes what is missing and rewrites nothing."""
    if dry_run:
        if as_json:
            raise click.UsageError("--json is for the final report; leave it out of a dry run")
        _preview(arguments)
        return
    on_stop("Finished shards are kept; the same command goes on from there.")
    from mlem_dist import api
    from mlem_dist.report.progress import Display

    # Ray prints messages of its nodes on standard output, also while disconnecting.
    with contextlib.redirect_stdout(sys.stderr), Display() as display:
        report = api.generate(**arguments, notify=say, progress=display.show)
    if as_json:
        click.echo(json.dumps(asdict(report)))
    else:
        _print(report)


def _preview(arguments: dict[str, Any]) -> None:
    """Print what a dataset takes, after a picture of its first images."""
    from mlem_dist import api
    from mlem_dist.report.tables import hours_table, preview_text

    with contextlib.redirect_stdout(sys.stderr):
        made = api.preview(**arguments, notify=say)
    devices = f"{made.devices} {'GPUs' if made.device == 'cuda' else 'CPU cores'}"
    click.echo(preview_text(made.num, made.shards, made.image_bytes, made.images_per_second, made.seconds, devices))
    click.echo(hours_table(made.hours))
    click.echo(f"Wrote {made.picture}")


def _print(report: GenerationReport) -> None:
    """Print the report for people."""
    out = report.out
    if not report.made:
        click.echo(f"{out} is finished already: {report.kept:,} images in {report.shards} shards.")
        return
    made, seconds = f"{report.made:,} images", f"in {report.seconds:.1f} s"
    if report.kept < report.num:
        click.echo(f"Made {made} {seconds}; {report.kept:,} are kept in {report.shards} shards of {out}.")
    else:
        click.echo(f"Wrote {made} to {out} ({report.num:,} in {report.shards} shards) {seconds}.")
    devices = f"{report.devices} {'GPUs' if report.device == 'cuda' else 'CPU cores'}"
    loading = f"{report.ready_seconds or 0:.1f} s of loading"
    click.echo(f"Sampling: {report.images_per_second:.1f} images/s on {devices}, after {loading}.")
    calls = (f"{name} {count:.1f}" for name, count in report.calls_per_sample.items())
    click.echo(f"Evaluations per image: {', '.join(calls)}")
    following = report.seed + report.num
    click.echo(f"Seeds:    {report.seed} to {following - 1}; take --seed {following} for more images")
    click.echo(f"Open it:  python -c {_quoted(_opening_line(out), out)}")
    click.echo(f"See it:   mlem-dist show {shlex.quote(out)}")


def _opening_line(out: str) -> str:
    """A line of Python that prints a dataset."""
    data = f"{out}/data"
    if "://" not in out:
        return f"import pyarrow.parquet as pq; print(pq.read_table({data!r}))"
    # pyarrow alone does not know every kind of URL. If one of its threads still holds a Python object when the
    # interpreter exits, the interpreter aborts.
    return (
        f"import pyarrow, pyarrow.parquet as pq, upath; data = upath.UPath({data!r}); "
        "files = (pyarrow.BufferReader(f.read_bytes()) for f in sorted(data.iterdir())); "
        "tables = (pq.ParquetFile(f, pre_buffer=False).read(use_threads=False) for f in files); "
        "print(pyarrow.concat_tables(tables))"
    )


def _quoted(line: str, out: str) -> str:
    # Only the path in the line can need the other kind of quotes.
    return f'"{line}"' if shlex.quote(out) == out else shlex.quote(line)


@click.command()
@plan_options
@click.option("--out", type=target, metavar="FILE", required=True, help="JSON file to write.")
def draw(out: Path, ladder: str, **arguments: Any) -> None:
    """Draw one plan and keep it, for `generate --plan`."""
    from mlem_dist import api

    loaded = api.load_ladder(ladder)
    plan, nfe = api.draw(loaded, out=out, **arguments)
    calls = dict(zip((level.name for level in loaded.levels), plan.calls.sum(1).tolist(), strict=True))
    click.echo(f"Wrote {out}: {nfe:.2f} evaluations of the best level; calls {calls}")
