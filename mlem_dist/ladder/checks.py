"""Checks of the files in a ladder's folder."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mlem_dist.errors import UsageError
from mlem_dist.files import read_object, remembered_digest
from mlem_dist.ladder.schema import SCHEDULER
from mlem_dist.models.weights import INDEX, WEIGHTS, weight_names
from mlem_dist.solver.process import Process, process_of

WEIGHT_FILE = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|msgpack|h5|index(\..+)?\.json)$")
"""Pattern of the names of files that may hold weights or an index of weight files."""


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of the tensors in a safetensors file, by name, from its header.

    Raises:
        UsageError: if the file is not a safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} is not a safetensors file: {error}") from None


def stored_values(files: Iterable[Path]) -> int:
    """The number of values in safetensors files.

    Raises:
        UsageError: as for `tensor_shapes`.
    """
    return sum(math.prod(shape) for path in files for shape in tensor_shapes(path).values())


def model_files(path: Path) -> list[str]:
    """The names of the files from which a model in folder `path` is loaded: its configuration and weights."""
    index, weights = weight_names(path)
    if (path / index).is_file():
        shards = read_object(path / index, "index of weights").get("weight_map")
        return ["config.json", index, *sorted(set(map(str, dict(shards or {}).values())))]
    return ["config.json", weights]


def check_model_folder(where: str, kind: str, path: Path) -> None:
    """Refuse the folder of a model that has no safetensors weights for diffusers to read.

    Args:
        where: the name of the model in messages, such as "level 'unet-1'".
        kind: its class in diffusers.
        path: the folder.

    Raises:
        UsageError: if the folder is that of a whole pipeline, has only weights of another name or format, or lacks
            shards of its weights.
    """
    if (path / "model_index.json").is_file() and not (path / "config.json").exists():
        parts = read_object(path / "model_index.json", "pipeline").items()
        models = [f"{path.name}/{key}" for key, value in parts if isinstance(value, list) and kind in value]
        way_out = f"set its path to {' or '.join(models)}" if models else "choose one that has such a part"
        raise UsageError(f"{where}: {path} is the folder of a whole pipeline, expected that of a {kind}; {way_out}")
    if path.is_file():
        raise UsageError(f"{where}: its path {path} is a file, expected the folder of a {kind}")
    if not path.is_dir():
        return
    index, weights = weight_names(path)
    if (path / index).is_file():
        _check_shards(where, path, index)
    elif not (path / weights).is_file():
        others = sorted(file.name for file in path.iterdir() if WEIGHT_FILE.search(file.name))
        raise UsageError(f"{where}: {path} lacks {WEIGHTS}; {_remedy(kind, path, others)}")


def _check_shards(where: str, path: Path, name: str) -> None:
    index = read_object(path / name, "index of weights").get("weight_map")
    if not isinstance(index, dict) or not index:
        raise UsageError(f"{where}: {path / name} has no weight_map; restore it")
    for shard in sorted(set(map(str, index.values()))):
        if not (path / shard).is_file():
            raise UsageError(f"{where}: {path / name} names {shard}, which is not there; restore it")


def _remedy(kind: str, path: Path, others: Sequence[str]) -> str:
    """The user's remedy for a folder `path` that has only the files `others` as weights."""
    tensors = [name for name in others if name.endswith(".safetensors")]
    if any("-of-" in name for name in tensors):
        return f"its shards are found by {INDEX}; restore that, or rename the index of a variant to it"
    if len(tensors) == 1:
        return f"rename {tensors[0]} to that"
    if tensors:
        return f"it has {', '.join(tensors)}; rename the one to use to that"
    if not others:
        return "restore it or train the ladder again"
    return (
        f"{', '.join(others)} is not read; convert it by `model = {kind}.from_pretrained({str(path)!r}, "
        f"use_safetensors=False)` and `model.save_pretrained({str(path)!r})`"
    )


def check_present(path: Path) -> None:
    """Require a file of a ladder.

    Raises:
        UsageError: if it is missing.
    """
    if not path.is_file():
        raise UsageError(f"ladder file {path} is missing on {platform.node()}; restore it, or make the ladder again")


def read_process(folder: Path, build: Callable[[dict[str, Any]], Process] = process_of) -> Process:
    """The process of the scheduler's configuration in a ladder's folder, by `build`.

    Raises:
        UsageError: by the file's name, if the configuration is unreadable or not understood.
    """
    config = read_object(folder / SCHEDULER, "noise schedule")
    try:
        return build(config)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{folder / SCHEDULER}: {error}") from None


def check_digest(path: Path, expected: str) -> None:
    """Compare a file's SHA-256 with the `expected` hex digest.

    Raises:
        UsageError: if the file is missing or its digest differs.
    """
    check_present(path)
    if remembered_digest(path) != expected:
        raise UsageError(f"ladder file {path} is corrupted: its SHA-256 is not the one in ladder.json; restore it")
