"""The file calibration.json, which holds the measurements of a ladder by device, and functions that read it."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlem_dist.errors import UsageError
from mlem_dist.files import check_writable, read_object, replace_file
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.solver.steps import ALIASES

SCHEMA_VERSION = 2
NAME = "calibration.json"


def device_key(device: str) -> str:
    """The key of a device's entry: type and name, such as "cuda/NVIDIA H200"."""
    if device == "cuda":
        return f"cuda/{torch.cuda.get_device_name()}"
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"cpu/{names[0] if names else platform.processor() or platform.machine()}"


def stored(folder: Path, ladder: Ladder) -> dict[str, Any]:
    """The entries of `folder`/calibration.json by device, as JSON values; empty if there is no such file.

    Raises:
        UsageError: if the folder is not writable, or the file is unreadable, or has another schema version or ladder.
    """
    check_writable(folder)
    return _read(folder / NAME, ladder)


def _read(path: Path, ladder: Ladder) -> dict[str, Any]:
    if not path.exists():
        return {}
    raw = read_object(path, "calibration")
    try:
        version, digest, devices = raw["schema_version"], raw["ladder"], dict(raw["devices"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a calibration ({error}); move it away or choose another `out`") from None
    if version != SCHEMA_VERSION:
        raise UsageError(f"{path}: schema_version is {version!r}, expected {SCHEMA_VERSION}; choose another `out`")
    if digest != ladder.digest:
        raise UsageError(
            f"{path} belongs to another ladder: its digest is {str(digest)[:12]}, that of {ladder.name!r} is "
            f"{ladder.digest[:12]}; move the file away or choose another `out`"
        )
    for entry in devices.values():
        entry["solvers"] = {ALIASES.get(name, name): measured for name, measured in entry["solvers"].items()}
    return devices


def read_effect(ladder: Ladder, solver: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Timesteps int64 (M,) and effects W_kl float64 (K, K, M) of a solver, from the calibration in the ladder's folder.

    Effects are the same on all devices but for rounding, so those of the first device are returned. The result is None
    if the ladder is not calibrated.

    Raises:
        UsageError: if the ladder's calibration.json is unreadable, or has another schema version or ladder.
    """
    devices = _read(ladder.folder / NAME, ladder)
    if not devices:
        return None
    measured = next(iter(devices.values()))["solvers"][solver]
    return np.array(measured["t"]), np.array(measured["products"], dtype=np.float64)


def measured_costs(ladder: Ladder, name: str) -> tuple[str, np.ndarray | None]:
    """The type of a device, "cpu" or "cuda", and its costs T_k, float64 (K,), in seconds per sample; None if unknown.

    If `name` is a device type, costs come from the ladder's entries. Otherwise they come from the first calibrated
    device whose name contains `name`, at its largest batch.

    Raises:
        UsageError: as for `read_effect`.
    """
    if name in ladder.levels[0].seconds:
        return ("cpu" if name == "cpu" else "cuda"), ladder.cost(name)
    for device, measured in _read(ladder.folder / NAME, ladder).items():
        kind, _, model = device.partition("/")
        if name.lower() in model.lower():
            return kind, np.array([level["seconds"][max(level["seconds"], key=int)] for level in measured["levels"]])
    return ("cpu" if name == "cpu" else "cuda"), None


def store_entry(folder: Path, ladder: Ladder, device: str, entry: Mapping[str, Any]) -> Path:
    """Write a device's JSON-ready entry to `folder`/calibration.json, and return the path of the file.

    The entry replaces an existing entry of the same device; entries of other devices remain.

    Raises:
        UsageError: as for `stored`.
    """
    devices = stored(folder, ladder) | {device: entry}
    raw = {"schema_version": SCHEMA_VERSION, "ladder": ladder.digest, "devices": devices}
    path = folder / NAME
    # Each innermost list is written on one line.
    text = re.sub(r"\[\s+([^][{}]*?)\s+\]", _one_line, json.dumps(raw, indent=1, allow_nan=False))
    replace_file(path, text + "\n")
    return path


def _one_line(match: re.Match[str]) -> str:
    return f"[{' '.join(match[1].split())}]"
