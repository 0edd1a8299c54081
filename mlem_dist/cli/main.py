"""The program: its commands, exit codes and errors."""

from __future__ import annotations

import re
import signal
import sys
from typing import Any, NoReturn

import click

from mlem_dist import __version__
from mlem_dist.cli.capacity import capacity
from mlem_dist.cli.datasets import export, remake, show, verify
from mlem_dist.cli.generation import draw, generate
from mlem_dist.cli.ladders import calibrate, ladder, train, tune
from mlem_dist.cli.options import expect_command, stop_note
from mlem_dist.errors import ScoreError, UsageError
from mlem_dist.machine import keep_streams

_stop_code = 130
_invoked = ""


@click.group(
    invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="mlem-dist")
@click.pass_context
def cli(context: click.Context) -> None:
    """Synthesise large image datasets from a ladder of diffusion models on Ray."""
    global _invoked
    expect_command(context)
    _invoked = context.invoked_subcommand or ""


for command in (generate, draw, show, verify, remake, export, ladder, train, calibrate, tune, capacity):
    cli.add_command(command)
# A hidden alias of `capacity`, for scripts for versions before 0.4.
cli.add_command(click.Command("plan", params=capacity.params, callback=capacity.callback, hidden=True))


def with_options(message: str) -> str:
    """A message of the library with its parameters, which are in backticks, replaced by this program's options."""
    command = cli.commands.get(_invoked)
    commands = command.commands.values() if isinstance(command, click.Group) else filter(None, [command])
    parameters = [parameter for each in commands for parameter in each.params]
    options = {parameter.name: parameter.opts[-1] for parameter in parameters if isinstance(parameter, click.Option)}
    return re.sub(r"`([a-z_]+)`", lambda name: options.get(name[1], name[0]), message)


def _terminated(number: int, frame: Any) -> NoReturn:
    # Ray's calls turn a SystemExit raised in them into exit code 1, and pass a KeyboardInterrupt on as a new one.
    global _stop_code
    _stop_code = 128 + number
    raise KeyboardInterrupt


def main() -> NoReturn:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 bad input, 3 incomplete, 130 Ctrl-C, 143 SIGTERM."""
    keep_streams()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = cli.main(standalone_mode=False) or 0
        # A failed write shows here, not at the exit of the interpreter.
        sys.stdout.flush()
        sys.exit(code)
    except (click.ClickException, UsageError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else with_options(str(error))
        click.echo(f"Error: {message}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"Stopped. {stop_note()}".strip(), err=True)
        sys.exit(_stop_code)
    except Exception as error:
        from ray.exceptions import RayError

        if not isinstance(error, RuntimeError | OSError | ArithmeticError | RayError):
            raise
        if isinstance(error, ScoreError) and error.details:
            click.echo(error.details.rstrip(), err=True)
        click.echo(f"Error: {with_options(' '.join(str(error).split()))}", err=True)
        sys.exit(1)
