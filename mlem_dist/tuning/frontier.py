"""Error against time: a JSON file that grows row by row, so that a rerun continues where the last run stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlem_dist.errors import UsageError
from mlem_dist.files import check_writable, replace_file
from mlem_dist.tuning.comparison import Measurement


@dataclass(frozen=True)
class Row:
    """Cost of one sampling method and its error against the reference.

    Attributes:
        family: the curve that the row belongs to.
        label: the point on that curve.
        seconds: seconds per sample.
        errors: mean squared error per value of each sample, float64 (n,).
    """

    family: str
    label: str
    seconds: float
    errors: np.ndarray

    @property
    def error(self) -> float:
        """Mean squared error per value over all samples."""
        return float(self.errors.mean())


class Frontier:
    """Rows of the JSON file `path`, all measured with `settings`.

    Raises:
        UsageError: if the file cannot be written, is unreadable, or has other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.rows: list[Row] = []
        check_writable(path.parent)
        if not path.exists():
            return
        try:
            raw = json.loads(path.read_bytes())
            rows = raw.pop("rows")
            self.rows = [Row(r["family"], r["label"], r["seconds"], np.array(r["errors"])) for r in rows]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is not a frontier ({error}); move it away or choose another `out`") from None
        for key in sorted(raw.keys() | settings.keys()):
            if raw.get(key) != settings.get(key):
                raise UsageError(
                    f"{path} is of another {key}: {str(raw.get(key))[:40]}, not {str(settings.get(key))[:40]}; "
                    "move it away, or choose another `out`"
                )

    def find(self, family: str, label: str) -> Row | None:
        """Row of a family and label, or None."""
        return next((row for row in self.rows if (row.family, row.label) == (family, label)), None)

    def add(self, family: str, label: str, measurement: Measurement) -> Row:
        """Append a row, write the file and return the row."""
        row = Row(family, label, measurement.seconds, measurement.errors)
        self.rows.append(row)
        lines = [json.dumps(_plain(row)) for row in self.rows]
        text = json.dumps(self.settings, indent=1)[:-2] + ',\n "rows": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
        replace_file(self.path, text)
        return row


def _plain(row: Row) -> dict[str, Any]:
    errors = [float(f"{error:.4g}") for error in row.errors]
    return {"family": row.family, "label": row.label, "seconds": float(f"{row.seconds:.6g}"), "errors": errors}


def stored_steps(path: Path) -> int | None:
    """The number of steps of a frontier's file; None if there is no such file, or it is no frontier."""
    try:
        steps = json.loads(path.read_bytes())["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return steps if isinstance(steps, int) else None


def lower_envelope(rows: Sequence[Row]) -> list[Row]:
    """Rows of finite error that no other row beats in both time and error, in order of time."""
    best: list[Row] = []
    for row in sorted((row for row in rows if np.isfinite(row.error)), key=lambda row: (row.seconds, row.error)):
        if not best or row.error < best[-1].error:
            best.append(row)
    return best
