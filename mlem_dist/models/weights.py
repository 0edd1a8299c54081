"""Weights in safetensors files."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mlem_dist.files import replace_file


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically, with the permissions of any new file.

    Raises:
        OSError: if the disk is full or not writable.
    """

    def write(temporary: Path) -> None:
        # Safetensors would restrict read permission to the user.
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from None
        temporary.chmod(mode)

    replace_file(path, write)
