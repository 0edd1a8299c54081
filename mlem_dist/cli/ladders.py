"""Commands that look at, train, calibrate and tune ladders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlem_dist.cli.options import (
    address_option,
    data_option,
    device_option,
    expect_command,
    folder_or_number,
    given,
    number,
    numbers,
    on_stop,
    precise,
    prompts_options,
    say,
    scale,
    source,
    target,
    width_height,
)


@click.group(invoke_without_command=True)
@click.pass_context
def ladder(context: click.Context) -> None:
    """Make and look at ladders."""
    expect_command(context)


@ladder.command("show")
@click.argument("name", type=given)
def ladder_show(name: str) -> None:
    """Print the levels of a ladder, by bundled name or folder."""
    from mlem_dist import api
    from mlem_dist.report.tables import ladder_table

    click.echo(ladder_table(api.load_ladder(name)))


@ladder.command("create")
@click.argument("out", type=target)
@click.option(
    "--model",
    "models",
    type=given,
    metavar="MODEL",
    multiple=True,
    required=True,
    help="Folder of a pipeline or a model of diffusers, its URL or id on the hub, or a .safetensors checkpoint in one "
    "file, with :bfloat16 or :float16 to compute in that; several times, the best model last.",
)
@click.option(
    "--pipeline",
    type=given,
    metavar="FOLDER",
    help="Pipeline of the scheduler, decoder and text encoders.  [default: that of the last model]",
)
@click.option(
    "--guidance",
    type=scale,
    metavar="SCALE[,START,STOP]",
    help="Adds to each model a level with guidance, in all the noise schedule (0 to 1) or in a part of it.",
)
@click.option("--unguided/--no-unguided", default=True, help="Whether models with guidance are levels without it, too.")
@click.option(
    "--true-guidance", type=float, metavar="SCALE", help="true_cfg_scale of FLUX: adds levels of two evaluations."
)
@click.option("--guide-with", metavar="MODEL", help="Model that gives the direction of guidance to all others, too.")
@click.option("--size", type=width_height, metavar="WxH", help="Size of images in pixels.  [default: the model's]")
@click.option(
    "--gaussian",
    type=folder_or_number,
    metavar="FOLDER|N",
    help="Adds a Gaussian below, fitted to the images in FOLDER or to N samples of the best level.",
)
@prompts_options("Some hundred prompts of these samples.")
@click.option("--copy", is_flag=True, help="Copy models into OUT, instead of referring to them where they are.")
@click.option("--measure/--no-measure", default=True, help="Measure the levels' costs here, or count operations.")
def ladder_create(out: Path, models: tuple[str, ...], prompts: str | None, prompt_column: str, **options: Any) -> None:
    """Make a ladder of models of diffusers in the new folder OUT, which refers to them where they are.

    Checkpoints in single files are converted into OUT.
    """
    from mlem_dist.dataset.prompts import first_prompts
    from mlem_dist.ladder.ladder import Ladder
    from mlem_dist.report.tables import ladder_table

    options["prompts"] = first_prompts(prompts, prompt_column) if prompts else ()
    names, precisions = zip(*map(precise, models), strict=True)
    click.echo(ladder_table(Ladder.create(out, names, precision=precisions, **options, notify=say)))


@ladder.command("measure")
@click.argument("folder", type=source)
def ladder_measure(folder: Path) -> None:
    """Measure the cost of each level on this machine and store it in FOLDER/ladder.json."""
    from mlem_dist import api
    from mlem_dist.report.tables import ladder_table

    click.echo(ladder_table(api.measure(folder)))


@click.command()
@data_option
@click.option("--config", type=source, metavar="FILE", required=True, help="YAML; see the docs.")
@click.option("--out", type=target, metavar="FOLDER", required=True, help="Ladder folder; a rerun goes on.")
@device_option
@address_option
def train(**arguments: Any) -> None:
    """Train a ladder, its levels side by side. The same command again continues after a kill."""
    on_stop("What is trained is kept; the same command goes on from there.")
    from mlem_dist import api
    from mlem_dist.report.progress import training_bar
    from mlem_dist.report.tables import ladder_table

    with training_bar() as progress:
        trained, figure, finished = api.train(**arguments, notify=say, progress=progress)
    if finished:
        click.echo(f"{trained.folder} is finished already.")
    click.echo(ladder_table(trained))
    click.echo(f"Wrote {figure}")


@click.command()
@click.argument("ladder", type=given)
@click.option(
    "--data",
    type=source,
    metavar="FOLDER",
    help="Folder of images, for denoising errors too: IDX files, Parquet or pictures; see the docs.",
)
@prompts_options("Some dozen prompts, for a ladder that takes prompts.")
@device_option
@address_option
@click.option(
    "--out", type=target, metavar="FOLDER", help="Folder for calibration.json and figures.  [default: the ladder's]"
)
@click.option("--compile", "compiled", is_flag=True, help="Time UNets by torch.compile as well; takes minutes.")
def calibrate(ladder: str, **arguments: Any) -> None:
    """Measure LADDER on this device: time, error, increments and their effect, gamma, predicted speed-up.

    Writes calibration.json, beside other devices' entries, and two figures.
    """
    from mlem_dist import api
    from mlem_dist.report.progress import parts_bar
    from mlem_dist.report.tables import calibration_table

    loaded = api.load_ladder(ladder)
    with parts_bar() as progress:
        calibration, written, replaced = api.calibrate(loaded, **arguments, notify=say, progress=progress)
    click.echo(calibration_table(loaded, calibration))
    click.echo(f"Wrote {', '.join(map(str, written))}" + (f"; replaced {calibration.device}" if replaced else ""))


@click.command()
@click.argument("ladder", type=given)
@click.option("--nfe", type=numbers, default="5,10,20,40", show_default=True, help="Budgets, as for generate.")
@click.option(
    "--solver", type=click.Choice(["ode", "sde", "ddim", "ddpm"]), metavar="[ode|sde]", default="ode", show_default=True
)
@click.option("--steps", type=number, help="Base steps, as for generate.  [default: by measurement]")
@prompts_options("Some hundred prompts, for a ladder that takes prompts.")
@click.option("--minutes", type=float, help="Fits to fewer samples, so that the search takes about that long, at most.")
@device_option
@address_option
@click.option("--out", type=target, metavar="FOLDER", required=True, help="Folder; a rerun goes on.")
def tune(ladder: str, **arguments: Any) -> None:
    """Find plans for LADDER: try ways to spend each budget, and judge them on other noises.

    Writes plan-SOLVER-NFE.json, frontier-SOLVER.json and frontier-SOLVER.png. Where OUT is the ladder's folder,
    `generate --nfe NFE` uses the plans.
    """
    on_stop("Plans that are found and judged are kept; the same command goes on from there.")
    from mlem_dist import api
    from mlem_dist.report.progress import parts_bar
    from mlem_dist.report.tables import frontier_table

    with parts_bar() as progress:
        rows, written = api.tune(ladder, **arguments, notify=say, progress=progress)
    click.echo(frontier_table(rows))
    click.echo(f"Wrote {', '.join(map(str, written))}")
