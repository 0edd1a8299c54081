"""Scores of finished images by the user's classes. This module does not need torch."""

from __future__ import annotations

import importlib
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mlem_dist.engine.job import Job
from mlem_dist.engine.progress import Work
from mlem_dist.engine.writer import fields_of, score_columns
from mlem_dist.errors import ScoreError, UsageError

NSFW = "nsfw"
"""Name of the score by a pipeline's safety checker, and of its column."""

Batch = dict[str, np.ndarray]
"""Columns by name, each with a value for each image; `image` is uint8 (B, H, W, C)."""

TIMED = 4
"""Number of images for which classes are timed."""


def find_class(name: str, folder: str) -> Callable[[], Callable[[Batch], Mapping[str, Any]]]:
    """The class of a name MODULE:CLASS, of a module that is installed or lies in a folder.

    Raises:
        UsageError: if there is none.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute or module.startswith("."):
        raise UsageError(f"`scores` {name!r}: expected MODULE:CLASS")
    # Last, so that no file there takes the place of a library.
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        score_class = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"`scores` {name!r} cannot be imported ({error}); every node must have its module, installed or in {folder}"
        ) from None
    except Exception as error:
        raise _raised(name, error, 1) from None
    if not isinstance(score_class, type):
        raise UsageError(f"`scores` {name!r} is {score_class!r}, expected a class")
    return score_class


class Scorer:
    """The score classes of a job, each made once.

    Raises:
        UsageError: as `find_class`.
        ScoreError: if a class cannot be made.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._taken = {*job.schema().names}
        self._scores = []
        for name in job.scores:
            own = name != NSFW
            score = _guarded(name, find_class(name, job.scores_folder))() if own else _safety_score(job)
            self._scores.append((name, _guarded(name, score)))

    def columns(self, block: int, images: np.ndarray) -> Batch:
        """The new columns of a block's images, uint8 (B, H, W, C).

        Raises:
            ScoreError: if a class raises, or what it returns is no column for each image.
        """
        first = block * self.job.block_size
        samples = range(first, first + len(images))
        rows: dict[str, Any] = {"sample_id": samples, **self.job.rows(samples), "seed": self.job.seeds(samples)}
        batch = {name: _read_only(np.array(values)) for name, values in rows.items()} | {"image": _read_only(images)}
        new: Batch = {}
        for name, score in self._scores:
            returned = score(dict(batch))
            if not isinstance(returned, Mapping):
                raise ScoreError(f"score {name} returns {type(returned).__name__}, expected a dict of columns", "")
            for column, values in returned.items():
                if column in batch:
                    continue
                if column in new or column in self._taken:
                    raise ScoreError(f"score {name} returns a column {column!r}, which is there already", "")
                new[str(column)] = _array(f"score {name}: its column {column!r}", values, len(images))
        if not new:
            raise ScoreError(f"{', '.join(self.job.scores)}: no new column is returned", "")
        return new

    def time(self, shape: Sequence[int]) -> tuple[float, dict[str, pa.DataType]]:
        """Seconds per image for images of (C, H, W), in a second run on some, and the types of the new columns.

        This is also a check that images can be scored, and that the job's condition fits the columns.

        Raises:
            ScoreError: as `columns` and `score_columns`, or if a column is null for all images.
            UsageError: as `Condition.check`.
        """
        channels, height, width = shape
        images = np.random.default_rng(0).integers(0, 256, (TIMED, height, width, channels), dtype=np.uint8)
        for _ in range(2):
            start = time.perf_counter()
            columns = self.columns(0, images)
        seconds = (time.perf_counter() - start) / TIMED
        types = {name: array.type for name, array in score_columns([columns], TIMED, {}).items()}
        if unknown := [name for name, kind in types.items() if pa.types.is_null(kind)]:
            raise ScoreError(
                f"the column {unknown[0]!r} of scores is null for {TIMED} images of noise, so that its type is not "
                "known; return NaN or an empty text instead",
                "",
            )
        if self.job.keep:
            self.job.keep.check(self.job.schema(fields_of(types)))
        return seconds, types

    def score(self, block: int, images: np.ndarray) -> tuple[Work, Batch]:
        """The work, and the new columns of a block."""
        start = time.process_time()
        columns = self.columns(block, images)
        return Work(time.process_time() - start, {}, len(images), images.nbytes), columns


def _safety_score(job: Job) -> Callable[[Batch], Mapping[str, Any]]:
    """The score by the safety checker of the ladder's pipeline."""
    from mlem_dist.ladder.ladder import Ladder

    checker = Ladder.read(job.ladder).load_checker(job.device)
    return lambda batch: {NSFW: checker(batch["image"])}


def time_scores(job: Job, shape: Sequence[int]) -> tuple[float, dict[str, pa.DataType]]:
    """Seconds per image and types of columns of a job's score classes, as `Scorer.time`."""
    return Scorer(job).time(shape)


def _read_only(array: np.ndarray) -> np.ndarray:
    """A view of an array that cannot be changed: what one class changed, others and the dataset would have."""
    view = array.view()
    view.flags.writeable = False
    return view


def _array(what: str, values: Any, number: int) -> np.ndarray:
    """Values for images as an array; lists of different lengths are its objects."""
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.empty(len(values), dtype=object)
        array[:] = [list(value) for value in values]
    except (TypeError, RuntimeError) as error:
        raise ScoreError(f"{what} is no array: {error}", "") from None
    if array.ndim < 1 or len(array) != number:
        raise ScoreError(f"{what} is not a value for each of the images", "")
    return array


def _raised(name: str, error: Exception, own: int) -> ScoreError:
    """The error for what the user's code raises, with its traceback without the first `own` frames, of this module."""
    lines = traceback.format_exception(error)
    return ScoreError(f"score {name} raises {type(error).__name__}: {error}", "".join(lines[1 + own :]))


def _guarded(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """A function that raises what the user's code raises as one error, with its traceback."""

    def guarded(*arguments: Any) -> Any:
        try:
            return call(*arguments)
        except Exception as error:
            raise _raised(name, error, 1) from None

    return guarded
