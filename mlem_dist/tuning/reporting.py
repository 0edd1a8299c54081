"""Types of the progress callbacks of long computations."""

from __future__ import annotations

from collections.abc import Callable

ReportProgress = Callable[[int, int], None]
"""Callback with the amount of work done and the total amount."""

ReportStage = Callable[[str, int, int], None]
"""Callback with the current stage, and the amount of its work done and its total amount."""
