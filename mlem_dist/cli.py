"""The command line: parse, call, print."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from mlem_dist import __version__
from mlem_dist.errors import UsageError
from mlem_dist.extras import require
from mlem_dist.files import check_writable
from mlem_dist.machine import available_cores, keep_streams

if TYPE_CHECKING:
    from mlem_dist.dataset.store import Location
    from mlem_dist.training.data import Images

DEFAULT_NFE = 10.0
_stop_code, _stop_note = 130, ""


def number(value: Any) -> int:
    """A positive whole number: 1000, 1e6 or 1_000_000."""
    try:
        found = float(value) if not isinstance(value, str) or "e" in value.lower() else int(value)
        if found == int(found) and 1 <= found <= 10**15:
            return int(found)
    except (ValueError, OverflowError):
        pass
    raise click.BadParameter(
        f"{value!r}: expected a positive whole number such as 1000, 1e6 or 1_000_000, at most 1e15"
    )


def given(value: str) -> str:
    """A name or path; an empty one is that of a variable that is not set."""
    if not value:
        raise click.BadParameter("it is empty, expected a name or path; is a variable not set?")
    return value


def source(value: str) -> Path:
    """A path to read from."""
    return Path(given(value))


def target(value: str) -> Path:
    """A path to write to."""
    path = source(value)
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not path.is_absolute():
        raise click.BadParameter(
            f"{value!r} is a relative path, and a Ray job runs in a folder of Ray's, which it removes; expected an "
            "absolute path or a URL"
        )
    return path


def location(value: str) -> Location:
    """A path, or the URL of a folder in an object store."""
    from mlem_dist.dataset.store import parse_location

    return parse_location(given(value))


def target_location(value: str) -> Location:
    """As `location`, to write to."""
    place = location(value)
    return target(value) if place == Path(value) else place


@click.group(
    invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="mlem-dist")
@click.pass_context
def cli(context: click.Context) -> None:
    """Synthesise large image datasets from a ladder of diffusion models on Ray."""
    _expect_command(context)


def _expect_command(context: click.Context) -> None:
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(2)


def _budget_options(command: Any) -> Any:
    """The options that say how much is spent and how."""
    for option in reversed(
        [
            click.option(
                "--solver",
                type=click.Choice(["ddim", "ddpm", "dpm++"]),
                default="ddim",
                show_default=True,
                help="The ODE by DDIM or DPM-Solver++(2M), or the SDE by DDPM.",
            ),
            click.option("--steps", type=number, default=250, show_default=True, help="Base steps."),
            click.option(
                "--nfe",
                type=float,
                help=f"Compute per sample, in evaluations of the best level.  [default: {DEFAULT_NFE:g}]",
            ),
            click.option(
                "--probabilities",
                type=click.Choice(["neyman", "theory", "inverse-cost", "constant", "log-snr"]),
                help="How the budget is spread over levels and steps.  [default: neyman if the ladder is calibrated, "
                "else theory]",
            ),
            click.option(
                "--draw",
                type=click.Choice(["systematic", "independent", "quantiles"]),
                help="Coins evenly spread, or independent, or none but the quantiles of the probabilities.  "
                "[default: systematic]",
            ),
            click.option(
                "--increments",
                type=click.Choice(["extrapolated", "held", "impulse"]),
                help="Keep each increment until the next, or the line through the last two (both biased, smaller "
                "error), or divide it by its probability (unbiased ML-EM).  [default: held for ddpm, extrapolated for "
                "ddim]",
            ),
        ]
    ):
        command = option(command)
    return command


def _plan_options(command: Any) -> Any:
    """The options that decide a plan."""
    command = click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="auto is GPUs if there are any.",
    )(command)
    command = click.option(
        "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Decides every noise and coin."
    )(command)
    command = _budget_options(command)
    return click.option(
        "--ladder",
        "ladder_name",
        type=given,
        metavar="NAME",
        default="fashion",
        show_default=True,
        help="Bundled name or folder.",
    )(command)


@cli.command()
@click.option("--num", type=number, required=True, help="Images: 1000, 1e6, 1_000_000.")
@click.option(
    "--out",
    type=target_location,
    metavar="FOLDER",
    required=True,
    help="Dataset folder, or its URL, such as s3://BUCKET/NAME; a rerun finishes it.",
)
@_plan_options
@click.option(
    "--plan", "plan_file", type=source, metavar="FILE", help="A plan of `mlem-dist draw` or `tune`, for all blocks."
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="What UNets compute in. bfloat16 is faster on GPUs, and on CPUs that have instructions for it.",
)
@click.option("--labels", default="all", show_default=True, help="Classes, such as 0,3,9; balanced.")
@click.option("--block-size", type=number, help="Samples that advance together.  [default: 100; on a GPU 500]")
@click.option("--shard-size", type=number, default=2000, show_default=True, help="Samples per Parquet file.")
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
@click.option(
    "--address", help="HOST:PORT of a Ray head, auto, or local.  [default: the cluster this runs in, else local]"
)
@click.option(
    "--engine",
    type=click.Choice(["ray", "inline"]),
    default="ray",
    show_default=True,
    help="inline is this process alone, with a thread per device.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the final report as JSON.")
def generate(
    num: int,
    out: Location,
    ladder_name: str,
    seed: int,
    plan_file: Path | None,
    precision: str,
    labels: str,
    block_size: int | None,
    shard_size: int,
    placement: str,
    coalesce: int,
    devices: int | None,
    address: str | None,
    engine: str,
    as_json: bool,
    device: str,
    **choices: Any,
) -> None:
    """Generate a Parquet dataset. The same command again finishes what is missing and rewrites nothing."""
    started = time.monotonic()
    _on_stop("Finished shards are kept; the same command goes on from there.")
    from mlem_dist.ladder.ladder import Ladder
    from mlem_dist.report.progress import Display
    from mlem_dist.report.tables import placement_reason
    from mlem_dist.runtime.generate import complete, open_dataset
    from mlem_dist.runtime.job import BLOCK_SIZE, Job
    from mlem_dist.runtime.placement import parse_placement

    ladder = Ladder.load(ladder_name)
    chosen = _labels(labels, len(ladder.labels))
    parsed = None if placement == "auto" else parse_placement(placement, len(ladder.levels))
    if parsed and any(parsed.kinds) and devices:
        raise UsageError(f"--placement {placement} names its devices; leave out --devices")
    if coalesce > 1 and parsed and len(parsed.pools) == 1:
        raise UsageError(f"--coalesce {coalesce}: one pool for all levels asks no other; leave it out")
    if engine == "inline" and (parsed or coalesce > 1 or (address or "local") != "local"):
        raise UsageError("--engine inline has no pools; leave out --placement, --coalesce and --address")
    remote = False
    if engine == "ray":
        from mlem_dist.runtime import cluster

        remote = cluster.is_remote(address)
    device = _local_device(device, remote)
    # Bad input is refused before there is a connection to wait for; the device's own costs are known after it.
    plan, note = _plan(ladder, ladder.cost(device), plan_file, **choices)
    if remote:
        cluster.connect(address)
        device = cluster.device_type(device)
        plan, note = _plan(ladder, ladder.cost(device), plan_file, **choices)
    if block_size is None:
        block_size = BLOCK_SIZE[device]
    job = Job(
        ladder=ladder.source,
        digest=ladder.digest,
        num=num,
        labels=chosen,
        solver=choices["solver"],
        steps=choices["steps"],
        plan=plan,
        seed=seed,
        block_size=block_size,
        shard_size=shard_size,
        device=device,
        precision=precision,
    )

    def reported(display: Display) -> dict[str, Any]:
        about = {"out": str(out), "num": num, "shards": job.shards, "seconds": time.monotonic() - started}
        return about | display.report()

    dataset = open_dataset(job, ladder, out)
    if not dataset.missing and dataset.manifest.shards:
        if as_json:
            click.echo(json.dumps(reported(Display(0, block_size, ()))))
        else:
            click.echo(f"{out} is finished already: {num:,} images in {job.shards} shards.")
        return
    if note:
        click.echo(note, err=True)
    if (measured := ladder.measured_on(device)) != device:
        click.echo(
            f"Evaluations are counted by the levels' costs on {measured}, as they were not measured on {device}; run "
            f"`mlem-dist ladder measure {ladder.source}` on such a machine, before the first dataset.",
            err=True,
        )
    if len(dataset.missing) < job.shards:
        click.echo(f"{out}: {job.shards - len(dataset.missing)} of {job.shards} shards are there; going on.", err=True)
        for name, was in dataset.manifest.versions.items():
            if (now := job.versions.get(name)) != was:
                click.echo(f"It was begun with {name} {was}; with {now} the rest may be rounded otherwise.", err=True)
    todo = sum(len(job.shard_rows(shard)) for shard in dataset.missing)
    if todo:
        ladder.check_models()
    if engine == "ray" and todo:
        if not remote:
            cluster.connect(address)
        from mlem_dist.runtime.arrange import arrange
        from mlem_dist.runtime.driver import run_ray

        arranged = arrange(replace(job, num=todo), ladder, parsed, devices, remote)
        if arranged.forecasts:
            click.echo(placement_reason(arranged.forecasts, arranged.timed), err=True)
        if coalesce > 1 and len(arranged.layout.pools) == 1:
            click.echo(f"--coalesce {coalesce} changes nothing here: one pool asks no other.", err=True)

        def run(shards: Any) -> Any:
            return run_ray(job, ladder, out, shards, arranged, coalesce)
    else:
        from mlem_dist.runtime.inline import run_inline

        # A GPU does one block after another.
        most = 1 if device == "cuda" else available_cores()
        # Those of a cluster are no matter where nothing is to be made.
        if engine == "inline" and devices and devices > most:
            raise UsageError(f"--devices {devices}: --engine inline has {most} here; lower it or leave it out")
        threads = min(devices or most, most)

        def run(shards: Any) -> Any:
            return run_inline(job, ladder, out, shards, threads)

    display = Display(todo, block_size, [level.name for level in ladder.levels])
    # Ray prints what its nodes say to standard output, also when it is left.
    with contextlib.redirect_stdout(sys.stderr), display:
        for progress in complete(dataset, ladder, run):
            display.show(progress)
        if engine == "ray" and todo:
            cluster.disconnect()
    if as_json:
        click.echo(json.dumps(reported(display)))
    else:
        _say(reported(display), device)


def _say(report: dict[str, Any], device: str) -> None:
    """The report for people."""
    out, made = report["out"], report["made"]
    whole = f"{report['num']:,} in {report['shards']} shards"
    click.echo(f"Wrote {made:,} images to {out} ({whole}) in {report['seconds']:.1f} s.")
    if made:
        devices = f"{report['devices']} {'GPUs' if device == 'cuda' else 'CPU cores'}"
        loading = f"{report['ready_seconds'] or 0:.1f} s of loading"
        click.echo(f"Sampling: {report['images_per_second']:.1f} images/s on {devices}, after {loading}.")
        calls = (f"{name} {count:.1f}" for name, count in report["calls_per_sample"].items())
        click.echo(f"Evaluations per image: {', '.join(calls)}")
    look = f"import pyarrow.parquet as pq; print(pq.read_table({f'{out}/data'!r}))"
    if "://" in out:
        # pyarrow alone does not know every kind of URL; and where a thread of its still holds an object of Python's at
        # the interpreter's end, that aborts.
        look = f"import pyarrow, pyarrow.parquet as pq, upath; data = upath.UPath({f'{out}/data'!r}); "
        look += "files = (pyarrow.BufferReader(f.read_bytes()) for f in sorted(data.iterdir())); "
        look += "tables = (pq.ParquetFile(f, pre_buffer=False).read(use_threads=False) for f in files); "
        look += "print(pyarrow.concat_tables(tables))"
    # Nothing in the line but the path needs the other kind of quotes.
    quoted = f'"{look}"' if shlex.quote(out) == out else shlex.quote(look)
    click.echo(f"Open it:  python -c {quoted}")
    click.echo(f"See it:   mlem-dist show {shlex.quote(out)}")


@cli.command()
@_plan_options
@click.option("--out", type=target, metavar="PATH", required=True, help="JSON file to write.")
def draw(out: Path, ladder_name: str, seed: int, device: str, **choices: Any) -> None:
    """Draw one plan and keep it, for `generate --plan`."""
    from mlem_dist.ladder.ladder import Ladder
    from mlem_dist.solver.plan import block_rng, write_plan
    from mlem_dist.tuning.recipe import make_recipe

    ladder = Ladder.load(ladder_name)
    _check_new(out)
    cost = ladder.cost(_local_device(device, False))
    plan = make_recipe(ladder, cost, **_with_budget(choices)).plan(block_rng(seed, 0))
    write_plan(out, plan, ladder.digest, choices["solver"])
    calls = dict(zip((level.name for level in ladder.levels), plan.calls.sum(1).tolist(), strict=True))
    click.echo(f"Wrote {out}: {plan.nfe(cost):.2f} evaluations of the best level; calls {calls}")


@cli.command()
@click.argument("out", type=location)
@click.option("--out", "picture", type=target, metavar="FILE", help="PNG to write.  [default: OUT/preview.png]")
def show(out: Location, picture: Path | None) -> None:
    """Make the contact sheet of a dataset."""
    from mlem_dist.report.sheet import save_contact_sheet

    if picture is not None:
        if picture.suffix.lower() != ".png":
            raise UsageError(f"--out {picture}: expected a name that ends in .png")
        _check_new(picture)
    click.echo(f"Wrote {save_contact_sheet(out, picture)}")


@cli.command()
@click.argument("out", type=location)
def verify(out: Location) -> None:
    """Compare every file of a dataset with the digest recorded when it was written."""
    from mlem_dist.dataset.manifest import read_manifest
    from mlem_dist.dataset.shards import damage, foreign, marked_shards

    manifest = read_manifest(out)
    shards = manifest.shards or marked_shards(out, manifest.fingerprint)
    problems = damage(out, shards)
    if manifest.shards:
        problems += [f"{path} is no shard, and readers of {out}/data take it for rows" for path in foreign(out, shards)]
    for problem in problems:
        click.echo(problem, err=True)
    if problems:
        click.echo("Remove these files; the command that made the dataset makes its shards again.", err=True)
        sys.exit(1)
    if not manifest.shards:
        are = f"{len(shards)} shards are there and as they were written"
        click.echo(f"{out} is not finished: {are}; run `mlem-dist generate` again to finish it.", err=True)
        sys.exit(3)
    click.echo(f"{out}: all {len(shards)} shards are as they were written.")


@cli.group(invoke_without_command=True)
@click.pass_context
def ladder(context: click.Context) -> None:
    """Look at ladders."""
    _expect_command(context)


@ladder.command("show")
@click.argument("name", type=given)
def ladder_show(name: str) -> None:
    """Print the levels of a ladder, by bundled name or folder."""
    from mlem_dist.ladder.ladder import Ladder
    from mlem_dist.report.tables import ladder_table

    click.echo(ladder_table(Ladder.load(name)))


@ladder.command("measure")
@click.argument("folder", type=source)
def ladder_measure(folder: Path) -> None:
    """Measure the cost of each level on this machine and store it in FOLDER/ladder.json."""
    from mlem_dist.ladder.ladder import Ladder
    from mlem_dist.ladder.measure import measure_costs
    from mlem_dist.report.tables import ladder_table

    ladder = Ladder.load(folder)
    ladder.check_models()
    click.echo(ladder_table(measure_costs(ladder)))


DATA_HELP = "Folder of images: IDX files, Parquet or pictures; see the docs."


@cli.command()
@click.option("--data", type=source, metavar="FOLDER", required=True, help=DATA_HELP)
@click.option("--config", "config_file", type=source, metavar="FILE", required=True, help="YAML; see the docs.")
@click.option("--out", type=target, metavar="PATH", required=True, help="Ladder folder; a rerun goes on.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--address", help="HOST:PORT of a Ray head, auto, or local.  [default: the cluster this runs in, else local]"
)
def train(data: Path, config_file: Path, out: Path, device: str, address: str | None) -> None:
    """Train a ladder, its levels side by side. The same command again continues after a kill."""
    from mlem_dist.ladder.ladder import Ladder
    from mlem_dist.report.figures import save_loss_curves
    from mlem_dist.report.progress import training_bar
    from mlem_dist.report.tables import ladder_table
    from mlem_dist.runtime import cluster
    from mlem_dist.training.config import read_config
    from mlem_dist.training.resume import WORK, check_training
    from mlem_dist.training.tasks import train_on_ray

    require("matplotlib", "figures")
    _on_stop("What is trained is kept; the same command goes on from there.")
    config = read_config(config_file)
    remote = cluster.is_remote(address)
    device = _local_device(device, remote)
    images = _images(data, config)
    if check_training(config, images, out):
        click.echo(f"{out} is finished already.")
    else:
        cluster.connect(address)
        device = cluster.device_type(device)
        cluster.count_devices(device, None)
        total = sum(level.steps for level in config.levels)
        with training_bar(total) as show:
            for progress in train_on_ray(config, images, out, device):
                show(progress)
    click.echo(ladder_table(Ladder.load(out)))
    logs = {level.name: out / WORK / level.name for level in config.levels if level.kind == "unet"}
    click.echo(f"Wrote {save_loss_curves(out / WORK, logs)}")


@cli.command()
@click.argument("name", type=given, metavar="LADDER")
@click.option("--data", type=source, metavar="FOLDER", required=True, help=DATA_HELP)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--out", type=target, metavar="PATH", help="Folder for calibration.json and figures.  [default: the ladder's]"
)
@click.option("--compile", "compiled", is_flag=True, help="Time UNets by torch.compile as well; takes minutes.")
def calibrate(name: str, data: Path, device: str, out: Path | None, compiled: bool) -> None:
    """Measure LADDER on this device: time, error, increments and their effect, gamma, predicted speed-up.

    Writes calibration.json, beside other devices' entries, and two figures.
    """
    from mlem_dist.ladder.calibration import device_key, stored
    from mlem_dist.ladder.ladder import Ladder
    from mlem_dist.report.figures import save_figures
    from mlem_dist.report.progress import parts_bar
    from mlem_dist.report.tables import calibration_table
    from mlem_dist.tuning.calibrate import calibrate as measure
    from mlem_dist.tuning.calibrate import store

    require("matplotlib", "figures")
    ladder = Ladder.load(name)
    device = _local_device(device, False)
    folder = ladder.folder if out is None else out
    replaced = device_key(device) in stored(folder, ladder)
    ladder.check_models()
    images = _images(data, ladder)
    with parts_bar() as progress:
        calibration = measure(ladder, images.test, images.test_label, device, progress, compiled=compiled)
    click.echo(calibration_table(ladder, calibration))
    written = [store(folder, ladder, calibration), *save_figures(folder, ladder, calibration)]
    click.echo(f"Wrote {', '.join(map(str, written))}" + (f"; replaced {calibration.device}" if replaced else ""))


def _images(data: Path, of: Any) -> Images:
    """The image dataset in a folder for a ladder or the configuration of one, with a word on what is not as it lies."""
    from mlem_dist.training.data import load_images

    images = load_images(data, of.sample_shape, of.labels)
    if images.resized:
        click.echo(f"{images.resized:,} images are larger than the samples: cropped and scaled down.", err=True)
    if images.skipped:
        click.echo(f"{images.skipped:,} files are no pictures: passed over.", err=True)
    return images


def numbers(value: str) -> tuple[float, ...]:
    """Positive numbers such as 5,10,20."""
    try:
        budgets = tuple(dict.fromkeys(float(part) for part in value.split(",")))
    except ValueError:
        budgets = ()
    if not budgets or not all(0 < nfe < 1e6 for nfe in budgets):
        raise click.BadParameter(f"{value!r}: expected positive numbers such as 5,10,20")
    return budgets


@cli.command()
@click.argument("name", type=given, metavar="LADDER")
@click.option("--nfe", type=numbers, default="5,10,20,40", show_default=True, help="Budgets, as for generate.")
@click.option("--solver", type=click.Choice(["ddim", "ddpm"]), default="ddim", show_default=True)
@click.option("--steps", type=number, default=250, show_default=True, help="Base steps, as for generate.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--out", type=target, metavar="PATH", required=True, help="Folder; a rerun goes on.")
def tune(name: str, nfe: tuple[float, ...], solver: str, steps: int, device: str, out: Path) -> None:
    """Find plans for LADDER: try ways to spend each budget, and judge them on other noises.

    Writes plan-SOLVER-NFE.json, frontier-SOLVER.json and frontier-SOLVER.png. Where OUT is the ladder's folder,
    `generate --nfe NFE` uses the plans.
    """
    from mlem_dist.ladder.ladder import Ladder
    from mlem_dist.report.figures import save_frontier
    from mlem_dist.report.progress import parts_bar
    from mlem_dist.report.tables import frontier_table
    from mlem_dist.tuning.choose import plan_path
    from mlem_dist.tuning.tune import open_frontier
    from mlem_dist.tuning.tune import tune as search

    require("matplotlib", "figures")
    _on_stop("Plans that are found and judged are kept; the same command goes on from there.")
    ladder = Ladder.load(name)
    ladder.check_models()
    device = _local_device(device, False)
    frontier = open_frontier(ladder, solver, steps, device, out)
    with parts_bar() as progress:
        rows = list(search(ladder, device, nfe, frontier, available_cores() if device == "cpu" else 1, progress))
    figure = save_frontier(frontier, frontier.path.with_suffix(".png"))
    click.echo(frontier_table(rows))
    plans = [str(plan_path(out, solver, budget)) for budget in nfe]
    click.echo(f"Wrote {', '.join([*plans, str(frontier.path), str(figure)])}")


@cli.command()
@click.argument("ladder_name", type=given, metavar="LADDER")
@click.option("--num", type=number, required=True, help="Images: 1e6, 1e9.")
@click.option(
    "--pool-devices",
    required=True,
    help="Devices by kind, KIND:COUNT or KIND:COUNT:GIB with the memory of each, such as h100:64:80,l4:256:24.",
)
@click.option(
    "--cost",
    "costs",
    multiple=True,
    help="A kind's ms per sample of each level, such as h100=0.01,0.2,1.  [default: for cpu and cuda those of `ladder "
    "measure`, else those that `calibrate` measured on a device of that name]",
)
@_budget_options
@click.option("--block-size", type=number, help="As for generate.  [default: 100; on GPUs 500]")
@click.option("--shard-size", type=number, default=2000, show_default=True, help="As for generate.")
@click.option("--out", type=target, metavar="PATH", help="A PNG: when each actor of a cell is at work.")
@click.option("--json", "as_json", is_flag=True, help="Print the forecast as JSON.")
def plan(
    ladder_name: str,
    num: int,
    pool_devices: str,
    costs: tuple[str, ...],
    block_size: int | None,
    shard_size: int,
    out: Path | None,
    as_json: bool,
    **choices: Any,
) -> None:
    """Simulate a cluster that makes NUM images with LADDER: rate, hours, bottleneck, best placement."""
    from mlem_dist.ladder.ladder import Ladder
    from mlem_dist.report.figures import save_timeline
    from mlem_dist.report.tables import capacity_table
    from mlem_dist.runtime.job import BLOCK_SIZE, Job
    from mlem_dist.runtime.planner import capacity_report, marginal, plan_capacity, read_kinds

    ladder = Ladder.load(ladder_name)
    if out is not None:
        require("matplotlib", "figures")
        _check_new(out)
    kinds = read_kinds(ladder, pool_devices, costs)
    device = kinds[0].devices.type
    job = Job(
        ladder=ladder.source,
        digest=ladder.digest,
        num=num,
        labels=(0,),
        solver=choices["solver"],
        steps=choices["steps"],
        plan=_plan(ladder, kinds[0].costs.alone, None, **choices)[0],
        seed=0,
        block_size=BLOCK_SIZE[device] if block_size is None else block_size,
        shard_size=shard_size,
        device=device,
    )
    found = plan_capacity(job, ladder.weight_bytes, kinds)
    gains = marginal(job, found[0])
    if as_json:
        click.echo(json.dumps(capacity_report(ladder, job, found, gains)))
    else:
        click.echo(capacity_table(ladder, num, found, gains))
    if out is not None:
        click.echo(f"Wrote {save_timeline(found[0], out)}", err=True)


def _labels(text: str, classes: int) -> tuple[int, ...]:
    if text == "all":
        return tuple(range(max(1, classes)))
    if not classes:
        raise UsageError(f"--labels {text}: the ladder has no classes; leave it out")
    try:
        labels = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--labels {text!r}: expected all or numbers such as 0,3,9") from None
    if bad := [label for label in labels if not 0 <= label < classes]:
        raise UsageError(f"--labels: {bad[0]} is out of range, the ladder has classes 0 to {classes - 1}")
    if len(set(labels)) != len(labels):
        raise UsageError(f"--labels {text}: a class stands there twice")
    return labels


def _local_device(device: str, remote: bool) -> str:
    """The device type here; undecided ("auto") where Ray is elsewhere."""
    if remote:
        return device
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device on this machine; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _with_budget(choices: dict[str, Any]) -> dict[str, Any]:
    return choices | {"nfe": DEFAULT_NFE if choices["nfe"] is None else choices["nfe"]}


def _plan(ladder: Any, cost: Any, plan_file: Path | None, **choices: Any) -> tuple[Any, str]:
    """The plan in a file, or what the options of a budget ask for; and what to say about it."""
    from mlem_dist.solver.plan import read_plan
    from mlem_dist.tuning.choose import choose_plan

    if plan_file is None:
        return choose_plan(ladder, cost, **_with_budget(choices))
    if given := [name for name in ("nfe", "probabilities", "draw", "increments") if choices[name] is not None]:
        raise UsageError(f"--{given[0]} and --plan exclude each other: a plan has its own; leave one out")
    return read_plan(plan_file, ladder.digest, len(ladder.levels), choices["solver"], choices["steps"]), ""


def _check_new(out: Path) -> None:
    """Refuse a file to write that is there, or in a folder that cannot be written."""
    check_writable(out.parent)
    try:
        there = out.exists() or out.is_symlink()
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror}; choose another name") from None
    if there:
        raise UsageError(f"--out {out} exists; choose another name")


def _on_stop(note: str) -> None:
    """What to say where this command is stopped."""
    global _stop_note
    _stop_note = note


def _terminated(number: int, frame: Any) -> NoReturn:
    # Ray's calls make exit code 1 of a SystemExit raised in them, and hand on a KeyboardInterrupt as a new one.
    global _stop_code
    _stop_code = 128 + number
    raise KeyboardInterrupt


def main() -> NoReturn:
    """Run the command line: 0 done, 1 failed, 2 bad input, 3 incomplete, 130 Ctrl-C, 143 SIGTERM."""
    keep_streams()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = cli.main(standalone_mode=False) or 0
        # What cannot be written is known here, and not when the interpreter ends.
        sys.stdout.flush()
        sys.exit(code)
    except (click.ClickException, UsageError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"Error: {message}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"Stopped. {_stop_note}".strip(), err=True)
        sys.exit(_stop_code)
    except Exception as error:
        from ray.exceptions import RayError

        if not isinstance(error, RuntimeError | OSError | ArithmeticError | RayError):
            raise
        click.echo(f"Error: {' '.join(str(error).split())}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
