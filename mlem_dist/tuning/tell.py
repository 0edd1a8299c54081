"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

Tell = Callable[[int, int], None]
"""Called with how much is done, and how much there is."""

TellStage = Callable[[str, int, int], None]
"""Called with what is being done before that."""
