"""Images per second of the Ray runtime, by placement, against the in-process engine: same plan, same cores, same files.

python benchmarks/runtime/engines.py --num 5000 --rounds 2 --solver ode --engine "in process" --engine "ray, auto" \
    --out benchmarks/results/engines.json
"""

import json
import platform
import sys
from pathlib import Path
from statistics import median
from typing import Any

import click
from processes import generated

LOCAL = ["--engine", "ray", "--address", "local", "--placement"]
ENGINES = {
    "in process": ["--engine", "inline"],
    "ray, auto": [*LOCAL, "auto"],
    "ray, 1-3,4-6": [*LOCAL, "1-3,4-6"],
    "ray, pools": [*LOCAL, "pools"],
}


def run(engine: str, num: int, devices: int, block_size: int, solver: str) -> tuple[dict[str, Any], list[str]]:
    """One run: its report, and the digests of its files."""
    options = ["--devices", str(devices), "--solver", solver, "--block-size", str(block_size), *ENGINES[engine]]
    report, digests = generated(num, *options)
    busy = sum(report["busy_seconds"].values()) / (report["sampling_seconds"] * devices)
    kept = ("images_per_second", "ready_seconds", "first_block_seconds", "sampling_seconds", "seconds")
    result = {"engine": engine, "busy_share": busy, **{key: report[key] for key in kept}}
    result |= {"calls_per_sample": report["calls_per_sample"], "busy_seconds": report["busy_seconds"]}
    return result, digests


@click.command()
@click.option("--num", default=2000)
@click.option("--rounds", default=1)
@click.option("--devices", default=2)
@click.option("--block-size", default=100)
@click.option("--solver", default="sde")
@click.option("--engine", "engines", type=click.Choice(list(ENGINES)), multiple=True, default=list(ENGINES))
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    num: int, rounds: int, devices: int, block_size: int, solver: str, engines: tuple[str, ...], out: Path
) -> None:
    """Rates are of the time after loading; loading is reported on its own."""
    runs = []
    files = set()
    for _ in range(rounds):
        for engine in engines:
            result, digests = run(engine, num, devices, block_size, solver)
            runs.append(result)
            files.add(tuple(digests))
            print({key: value for key, value in result.items() if not isinstance(value, dict)}, flush=True)
    if len(files) != 1:
        sys.exit("the engines wrote different files")
    rate = {name: median(one["images_per_second"] for one in runs if one["engine"] == name) for name in engines}
    result = {
        "machine": f"{platform.machine()}, {devices} cores",
        "num": num,
        "rounds": rounds,
        "block_size": block_size,
        "solver": solver,
        "ratio_to_in_process": {name: rate[name] / rate["in process"] for name in engines},
        "runs": runs,
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["ratio_to_in_process"]))


if __name__ == "__main__":
    main()
