"""The command that forecasts what a cluster makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mlem_dist.cli.options import budget_options, given, number, size_options, target


@click.command()
@click.argument("ladder", type=given)
@click.option("--num", type=number, required=True, help="Images: 1e6, 1e9.")
@click.option(
    "--pool-devices",
    required=True,
    help="Devices by kind, KIND:COUNT or KIND:COUNT:GIB with the memory of each, such as h100:64:80,l4:256:24.",
)
@click.option(
    "--cost",
    multiple=True,
    help="A kind's ms per sample of each level, such as h100=0.01,0.2,1.  [default: for cpu and cuda those of `ladder "
    "measure`, else those that `calibrate` measured on a device of that name]",
)
@budget_options
@size_options
@click.option("--out", type=target, metavar="FILE", help="A PNG: when each actor of a cell is at work.")
@click.option("--json", "as_json", is_flag=True, help="Print the forecast as JSON.")
def capacity(ladder: str, num: int, out: Path | None, as_json: bool, **arguments: Any) -> None:
    """Simulate a cluster that makes NUM images with LADDER: rate, hours, bottleneck, best placement."""
    from mlem_dist import api
    from mlem_dist.capacity.planner import capacity_report
    from mlem_dist.report.tables import capacity_table

    loaded = api.load_ladder(ladder)
    forecasts, gains = api.capacity(loaded, num=num, out=out, **arguments)
    if as_json:
        click.echo(json.dumps(capacity_report(loaded, num, forecasts, gains)))
    else:
        click.echo(capacity_table(loaded, num, forecasts, gains))
    if out is not None:
        click.echo(f"Wrote {out}", err=True)
