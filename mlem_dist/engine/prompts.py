"""Files of prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mlem_dist.errors import UsageError

COLUMNS = ("prompt", "negative_prompt")
"""Names of what a line of a JSON file may hold."""


def read_prompts(
    path: Path, negative_prompts: str | Sequence[str | None] | None
) -> tuple[list[str], str | Sequence[str | None] | None]:
    """The prompts in a file, and the negative prompts there, or those given.

    A file whose name ends in .jsonl has an object with `prompt` and, if it has one, `negative_prompt` in each line.
    Any other file has a prompt in each line.

    Raises:
        UsageError: if the file cannot be read, is empty or malformed, or has negative prompts that are given as well.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise UsageError(f"`prompts` {path} cannot be read: {reason}") from None
    if not text:
        raise UsageError(f"`prompts` {path} is empty, expected a prompt in each line")
    # `splitlines` would also split at characters that prompts may hold.
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if path.suffix != ".jsonl":
        return lines, negative_prompts
    rows = [_row(path, number, line) for number, line in enumerate(lines, 1)]
    prompts: list[str] = []
    for number, row in enumerate(rows, 1):
        if (prompt := row["prompt"]) is None:
            raise UsageError(f"`prompts` {path}: line {number} has the prompt null; give it a text, which may be empty")
        prompts.append(prompt)
    own = [row.get("negative_prompt") for row in rows]
    if all(value is None for value in own):
        return prompts, negative_prompts
    if negative_prompts is not None:
        raise UsageError(f"`negative_prompts`: {path} has negative prompts of its own; leave out either")
    return prompts, own


def _row(path: Path, number: int, line: str) -> dict[str, str | None]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UsageError(f"`prompts` {path}: line {number} is not JSON: {error}") from None
    if not isinstance(row, dict) or "prompt" not in row:
        raise UsageError(f"`prompts` {path}: line {number} is not an object with a prompt")
    if others := sorted(row.keys() - {*COLUMNS}):
        raise UsageError(f"`prompts` {path}: line {number} has {others[0]!r}, expected {' and '.join(COLUMNS)} only")
    for name, value in row.items():
        if not isinstance(value, str | None):
            raise UsageError(f"`prompts` {path}: {name} in line {number} is {value!r}, expected a text")
    return row
