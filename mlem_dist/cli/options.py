"""Option types, options that several commands share, and the note of a stopped command."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mlem_dist.store import Location

_stop_note = ""


def on_stop(note: str) -> None:
    """Set the note to print if this command is stopped."""
    global _stop_note
    _stop_note = note


def stop_note() -> str:
    """The note to print if this command is stopped."""
    return _stop_note


def say(sentence: str) -> None:
    """Print a sentence of the library on standard error, with options in place of parameters."""
    from mlem_dist.cli.main import with_options

    click.echo(with_options(sentence), err=True)


def expect_command(context: click.Context) -> None:
    """If a group is called without a command, print its help and exit with code 2."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(2)


def number(value: Any) -> int:
    """A positive whole number: 1000, 1e6 or 1_000_000."""
    try:
        whole = float(value) if not isinstance(value, str) or "e" in value.lower() else int(value)
        if whole == int(whole) and 1 <= whole <= 10**15:
            return int(whole)
    except (ValueError, OverflowError):
        pass
    raise click.BadParameter(
        f"{value!r}: expected a positive whole number such as 1000, 1e6 or 1_000_000, at most 1e15"
    )


def numbers(value: str) -> tuple[float, ...]:
    """Positive numbers such as 5,10,20."""
    try:
        budgets = tuple(dict.fromkeys(float(part) for part in value.split(",")))
    except ValueError:
        budgets = ()
    if not budgets or not all(0 < nfe < 1e6 for nfe in budgets):
        raise click.BadParameter(f"{value!r}: expected positive numbers such as 5,10,20")
    return budgets


def classes(value: str) -> tuple[int, ...] | None:
    """Class numbers such as 0,3,9; None for all."""
    if value == "all":
        return None
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r}: expected all or numbers such as 0,3,9") from None


def scale(value: str) -> tuple[float, ...]:
    """A guidance scale such as 7.5, or with start and stop such as 7.5,0,0.8."""
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r}: expected a number such as 7.5, or three such as 7.5,0,0.8") from None


def width_height(value: str) -> tuple[int, int]:
    """A size such as 1024x768, width first, as (height, width)."""
    try:
        width, height = map(int, value.lower().split("x"))
    except ValueError:
        width = height = 0
    if width < 1 or height < 1:
        raise click.BadParameter(f"{value!r}: expected width and height in pixels, such as 1024x768")
    return height, width


def folder_or_number(value: str) -> Path | int:
    """A folder, or a number where there is no such folder."""
    path = source(value)
    return int(value) if value.isdecimal() and not path.exists() else path


def precise(value: str) -> tuple[str, str]:
    """A model such as FOLDER:bfloat16 as its name and precision; float32 by default."""
    from mlem_dist.ladder.schema import PRECISIONS

    name, _, precision = value.rpartition(":")
    return (name, precision) if name and precision in PRECISIONS else (value, PRECISIONS[0])


def given(value: str) -> str:
    """A name or path; an empty one is refused, as its variable is probably not set."""
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
    from mlem_dist.store import parse_location

    return parse_location(given(value))


def target_location(value: str) -> Location:
    """As `location`, to write to."""
    place = location(value)
    return target(value) if place == Path(value) else place


def device_option(command: Any) -> Any:
    """The option for the device type."""
    return click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="auto is GPUs if there are any.",
    )(command)


def address_option(command: Any) -> Any:
    """The option for the address of Ray."""
    return click.option(
        "--address", help="HOST:PORT of a Ray head, auto, or local.  [default: the cluster this runs in, else local]"
    )(command)


def prompts_options(text: str) -> Callable[[Any], Any]:
    """The options for a table of prompts, with a help text."""

    def add(command: Any) -> Any:
        column = click.option("--prompt-column", default="prompt", show_default=True, help="The table's column.")
        return click.option("--prompts", type=given, metavar="FILE", help=text)(column(command))

    return add


def data_option(command: Any) -> Any:
    """The option for an image dataset."""
    return click.option(
        "--data",
        type=source,
        metavar="FOLDER",
        required=True,
        help="Folder of images: IDX files, Parquet or pictures; see the docs.",
    )(command)


def budget_options(command: Any) -> Any:
    """The options for the compute budget and the way it is spent."""
    for option in reversed(
        [
            click.option(
                "--solver",
                type=click.Choice(["ode", "sde", "dpm++", "ddim", "ddpm"]),
                default="ode",
                show_default=True,
                metavar="[ode|sde|dpm++]",
                help="The ODE, by DDIM or Euler's method; the SDE, by DDPM; or the ODE by DPM-Solver++(2M). ddim and "
                "ddpm are aliases of ode and sde.",
            ),
            click.option("--steps", type=number, help="Base steps.  [default: the tuned plan's, else 250]"),
            click.option(
                "--grid",
                type=click.Choice(["trailing", "model"]),
                default="trailing",
                show_default=True,
                help="Timesteps of the steps: the ends of equal intervals, or those of the pipeline by its scheduler's "
                "configuration.",
            ),
            click.option(
                "--nfe", type=float, help="Compute per sample, in evaluations of the best level.  [default: 10]"
            ),
            click.option(
                "--probabilities",
                type=click.Choice(["neyman", "theory", "inverse-cost", "constant", "log-snr"]),
                help="How the budget is spread over levels and steps.  [default: neyman if the ladder is calibrated; "
                "else the best level, evenly, and theory for the SDE and impulses; see the docs]",
            ),
            click.option(
                "--draw",
                type=click.Choice(["systematic", "independent", "quantiles"]),
                help="One plan for all images at the quantiles of the probabilities, or a plan drawn for each block by "
                "coins that are evenly spread or independent.  [default: quantiles; systematic for impulses]",
            ),
            click.option(
                "--increments",
                type=click.Choice(["extrapolated", "held", "impulse"]),
                help="Keep each increment until the next, or the line through the last two (both biased, smaller "
                "error), or divide it by its probability (unbiased ML-EM).  [default: held for sde, extrapolated for "
                "ode]",
            ),
        ]
    ):
        command = option(command)
    return command


def plan_options(command: Any) -> Any:
    """The options that decide a plan."""
    command = click.option(
        "--seed",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Image seed of the first image; the next images count up. Also decides drawn plans.",
    )(device_option(command))
    command = budget_options(command)
    return click.option(
        "--ladder", type=given, metavar="NAME", default="fashion", show_default=True, help="Bundled name or folder."
    )(command)


def size_options(command: Any) -> Any:
    """The options for blocks and shards."""
    command = click.option(
        "--shard-size", type=number, help="Samples per Parquet file.  [default: 2000; fewer of large images]"
    )(command)
    return click.option(
        "--block-size",
        type=number,
        help="Samples that advance together.  [default: 100; on GPUs 500; fewer of large images, or in little memory]",
    )(command)
