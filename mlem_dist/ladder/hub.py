"""Models on the Hugging Face Hub, by its own client and in its cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from mlem_dist.errors import UsageError
from mlem_dist.models.safety import CHECKER
from mlem_dist.models.weights import chosen_weights
from mlem_dist.store import hub_reached

PREFIX = "hub:"
"""Beginning of the paths of files on the hub in `ladder.json`: hub:OWNER/NAME@COMMIT/FOLDER/FILE."""

ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
"""An id as users give it: OWNER/NAME, or OWNER/NAME@REVISION."""

STORED = re.compile(rf"{PREFIX}([\w.-]+/[\w.-]+)@([0-9a-f]{{40}})(?:/(.+))?")

PARTS = (CHECKER, "text_encoder", "transformer", "unet", "vae")
"""Beginnings of the names of the parts of pipelines that are used."""

SMALL = ("*.json", "*.txt", "*.model")
"""Patterns of the files of configurations, tokenizers and indices of weights."""


def is_hub_id(text: str) -> bool:
    """Whether a text may be the id of a repository on the hub."""
    return ID.fullmatch(text) is not None


def fetch_pipeline(text: str) -> tuple[str, Path]:
    """The pinned path of a repository, with its branch resolved to a commit, and its folder in the hub's cache.

    Downloads the small files, and the weights of the parts of a pipeline or of a model, in safetensors files.

    Raises:
        UsageError: if the repository or its revision cannot be reached, or it has weights in other formats only.
    """
    from huggingface_hub import HfApi, snapshot_download

    match = ID.fullmatch(text)
    assert match
    name, revision = match.groups()
    with hub_reached(text):
        information = HfApi().model_info(name, revision=revision)
        commit = str(information.sha)
        files = [file.rfilename for file in information.siblings or ()]
        folder = snapshot_download(name, revision=commit, allow_patterns=needed_files(text, files))
    return f"{PREFIX}{name}@{commit}", Path(folder)


def fetch_configuration(name: str) -> Path:
    """The folder of a repository in the hub's cache, with its small files only: configurations and tokenizers.

    Raises:
        UsageError: if they are neither in the cache nor can be downloaded.
    """
    from huggingface_hub import snapshot_download

    with hub_reached(name):
        return Path(snapshot_download(name, allow_patterns=[*SMALL]))


def needed_files(text: str, files: Sequence[str]) -> list[str]:
    """The files of a repository that are used: the small ones, and those of weights as for `weights_of`."""
    return [*(file for file in files if any(fnmatchcase(file, pattern) for pattern in SMALL)), *weights_of(text, files)]


def weights_of(text: str, files: Sequence[str]) -> list[str]:
    """The safetensors files that the parts of a repository are loaded from: without variants, if there are others.

    Args:
        text: the repository's id, for the message.
        files: the paths of its files.

    Raises:
        UsageError: if a part has weights in other formats only.
    """
    weights: dict[str, list[str]] = {}
    pickles: dict[str, str] = {}
    for file in files:
        path = PurePosixPath(file)
        folder = str(path.parent)
        # Weights beside the parts of a pipeline are those of all in one file.
        if folder.startswith(PARTS) if "model_index.json" in files else folder == ".":
            if path.suffix == ".safetensors":
                weights.setdefault(folder, []).append(file)
            # A safety checker may be one that the pipeline does not use.
            elif path.suffix in (".bin", ".ckpt", ".pt", ".pth") and folder != CHECKER:
                pickles[folder] = file
    if missing := sorted(pickles.keys() - weights.keys()):
        raise UsageError(
            f"{text}: {pickles[missing[0]]} may run code when it is read, and is not; load it by diffusers with "
            "`use_safetensors=False`, save it by `save_pretrained`, and take that folder"
        )
    chosen: list[str] = []
    for names in weights.values():
        chosen += chosen_weights(names)
    return chosen


def local_path(path: str) -> Path:
    """The path of a file or folder on the hub in the cache of this machine; a missing file is downloaded.

    `path` is pinned, as it stands in `ladder.json`. The names of files have a suffix, and those of folders have none.

    Raises:
        UsageError: if a file is neither in the cache nor can be downloaded.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.constants import HF_HUB_CACHE

    match = STORED.fullmatch(path)
    if match is None:
        raise UsageError(f"{path}: expected {PREFIX}OWNER/NAME@COMMIT/PATH, with a commit of 40 hexadecimal digits")
    name, commit, rest = match.groups()
    local = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots" / commit / (rest or "")
    if local.exists() or not PurePosixPath(rest or "").suffix:
        return local
    with hub_reached(path):
        return Path(hf_hub_download(name, rest, revision=commit))
