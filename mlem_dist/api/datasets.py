"""Functions that read, show, verify and export an existing dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mlem_dist.api.arguments import check_new
from mlem_dist.errors import UsageError
from mlem_dist.store import Location, parse_location

if TYPE_CHECKING:
    import ray.data

    from mlem_dist.dataset.export import ExportReport
    from mlem_dist.dataset.shards import Shard


def read(out: str | Location) -> ray.data.Dataset:
    """The finished shards of a dataset as a Ray Dataset with the stored columns.

    Ray Data reads on the Ray to which this process is connected, else on that of RAY_ADDRESS, else on a new local one.

    Args:
        out: the dataset's folder, or its URL in an object store.

    Raises:
        UsageError: if there is no dataset, or it has no finished shard.
        RuntimeError: if Ray does not start.
    """
    import ray.data

    from mlem_dist.dataset.manifest import finished_shards, read_manifest
    from mlem_dist.runtime.cluster import connect

    place = parse_location(out) if isinstance(out, str) else out
    paths = [*finished_shards(place, read_manifest(place))]
    if not paths:
        raise UsageError(f"{place} has no finished shard yet; generate it to the end")
    # By itself, Ray Data would connect to any other program's Ray that it finds on this machine.
    connect(None, stay=True)
    filesystem = None if isinstance(place, Path) else place.fs
    root = str(place.absolute()) if isinstance(place, Path) else place.path
    return ray.data.read_parquet([f"{root}/{path}" for path in paths], filesystem=filesystem)


def show(dataset: str | Location, *, out: Path | None = None) -> Location:
    """Write the contact sheet of a dataset as a PNG file, and return the file's path.

    Args:
        dataset: the dataset's folder, or its URL in an object store.
        out: path of the PNG file; `preview.png` in the dataset's folder by default.

    Raises:
        UsageError: if there is no dataset, it has no finished shard, or `out` cannot be written.
    """
    from mlem_dist.report.sheet import save_contact_sheet

    if out is not None:
        if out.suffix.lower() != ".png":
            raise UsageError(f"`out` {out}: expected a name that ends in .png")
        check_new(out)
    return save_contact_sheet(parse_location(dataset) if isinstance(dataset, str) else dataset, out)


def verify(dataset: str | Location) -> tuple[list[Shard], list[str], bool]:
    """Compare every file of a dataset with the digest that was recorded when the file was written.

    Args:
        dataset: the dataset's folder, or its URL in an object store.

    Returns:
        The recorded shards, a sentence for each problem, and whether the dataset is finished.

    Raises:
        UsageError: if there is no dataset.
    """
    from mlem_dist.dataset.manifest import read_manifest, recorded_shards
    from mlem_dist.dataset.shards import damage, foreign

    place = parse_location(dataset) if isinstance(dataset, str) else dataset
    manifest = read_manifest(place)
    shards = recorded_shards(place, manifest)
    problems = damage(place, shards)
    if manifest.shards:
        problems += [
            f"{path} is no shard, and readers of {place}/data take it for rows" for path in foreign(place, shards)
        ]
    return shards, problems, bool(manifest.shards)


def export(dataset: str | Location, target: str | Location, *, format: Literal["webdataset", "folder"]) -> ExportReport:
    """Copy a finished dataset into the layout of another tool. The same call again finishes what is missing.

    Image files are copied as they are, and the same dataset makes the same bytes.

    Args:
        dataset: the dataset's folder, or its URL in an object store.
        target: a new or empty folder, or its URL in an object store.
        format: `webdataset` for tar files as img2dataset writes them, one for each shard; `folder` for pictures with a
            `metadata.jsonl`, as ImageFolder of Hugging Face reads them.

    Raises:
        UsageError: if there is no dataset, it is not finished or is damaged, a column cannot be exported, or the target
            is in the dataset, holds something else or cannot be written.
        OSError: if a file cannot be written.
    """
    from mlem_dist.dataset.export import export_dataset

    place = parse_location(dataset, "dataset") if isinstance(dataset, str) else dataset
    folder = parse_location(target, "target") if isinstance(target, str) else target
    return export_dataset(place, folder, format)
