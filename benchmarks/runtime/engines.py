"""Images per second of the Ray runtime against the in-process engine: same plan, same cores, same files.

python benchmarks/runtime/engines.py --num 3000 --rounds 2 --out benchmarks/results/engines.json
"""

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import click

SCRIPT = str(Path(sys.executable).with_name("mlem-dist"))


def run(engine: str, num: int, devices: int, options: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [SCRIPT, "generate", "--num", str(num), "--out", str(out), "--engine", engine, "--json"]
        command += ["--devices", str(devices), *(["--address", "local"] if engine == "ray" else []), *options]
        report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        manifest = json.loads((out / "mlem.json").read_text())
    steady = report["sampling_seconds"] - report["first_block_seconds"]
    return {
        "engine": engine,
        "digests": [shard["sha256"] for shard in manifest["shards"]],
        # Of all blocks but the first: start-up is reported on its own.
        "steady_images_per_second": (num - 50) / steady,
        "busy_share": sum(report["busy_seconds"].values()) / (report["sampling_seconds"] * devices),
        **{key: report[key] for key in ("seconds", "sampling_seconds", "first_block_seconds", "images_per_second")},
        "calls_per_sample": report["calls_per_sample"],
        "busy_seconds": report["busy_seconds"],
    }


@click.command()
@click.option("--num", default=3000)
@click.option("--rounds", default=2)
@click.option("--devices", default=2)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.argument("options", nargs=-1)
def main(num: int, rounds: int, devices: int, out: Path, options: tuple[str, ...]) -> None:
    runs = []
    for _ in range(rounds):
        for engine in ("inline", "ray"):
            runs.append(run(engine, num, devices, list(options)))
            print({key: value for key, value in runs[-1].items() if key != "digests"}, flush=True)
    assert len({tuple(one.pop("digests")) for one in runs}) == 1, "the engines wrote different files"

    def middle(engine: str, key: str) -> float:
        return median(one[key] for one in runs if one["engine"] == engine)

    result = {
        "machine": f"{platform.machine()}, {devices} cores",
        "num": num,
        "options": options,
        "ratio_steady": middle("ray", "steady_images_per_second") / middle("inline", "steady_images_per_second"),
        "ratio_with_start_up": middle("ray", "images_per_second") / middle("inline", "images_per_second"),
        "ray_busy_share": middle("ray", "busy_share"),
        "ray_first_block_seconds": middle("ray", "first_block_seconds"),
        "runs": runs,
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    print({key: value for key, value in result.items() if key != "runs"})


if __name__ == "__main__":
    main()
