"""The manifest of a dataset folder, `mlem.json`, and its card for people and Hugging Face, `README.md`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from mlem_dist.dataset.schema import IMAGE, features
from mlem_dist.dataset.shards import WORK, Shard, marked_shards, shard_index, whole_shards
from mlem_dist.errors import UsageError
from mlem_dist.files import listing, own_names, read_object
from mlem_dist.store import Location, check_location, listed, publish, reached, remove_folder

SCHEMA_VERSION = 1
NAME, CARD = "mlem.json", "README.md"


@dataclass(frozen=True)
class Manifest:
    """The content of `mlem.json`.

    Attributes:
        config: everything that decides the samples and their files, JSON-ready.
        labels: class names.
        versions: the library versions that wrote the first shard.
        calls: expected evaluations of each level per sample, by name; empty until the dataset is complete.
        shards: the finished shards in order; empty until the dataset is complete.
    """

    config: dict[str, Any]
    labels: tuple[str, ...]
    versions: dict[str, str]
    calls: dict[str, float]
    shards: tuple[Shard, ...]

    @property
    def columns(self) -> dict[str, str]:
        """The types of the columns of a table of prompts, by name; empty without one."""
        columns: dict[str, str] = self.config.get("columns", {})
        return columns

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the configuration."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()

    def write(self, out: Location) -> None:
        """Write `mlem.json`, complete or not at all."""
        raw = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self.fingerprint,
            "config": self.config,
            "labels": self.labels,
            "versions": self.versions,
            "calls_per_sample": self.calls,
            "shards": [asdict(shard) for shard in self.shards],
        }
        publish(out / NAME, json.dumps(raw, indent=1) + "\n", out / WORK)


def read_manifest(out: Location) -> Manifest:
    """Read a dataset folder's manifest.

    Raises:
        UsageError: if the folder holds no dataset of this program, has another schema version, or cannot be read.
    """
    try:
        with reached(out):
            if not (out / NAME).exists():
                raise UsageError(f"{out} is not a dataset of mlem-dist: it has no {NAME}")
            raw = read_object(out / NAME, "manifest")
    except OSError as error:
        raise UsageError(f"manifest {out / NAME} cannot be read: {error}") from None
    try:
        if raw["schema_version"] != SCHEMA_VERSION:
            raise UsageError(f"{out / NAME}: schema_version is {raw['schema_version']!r}, expected {SCHEMA_VERSION}")
        return Manifest(
            # A TypeError if it is no object.
            config={**raw["config"]},
            labels=tuple(raw["labels"]),
            versions=raw["versions"],
            calls=raw["calls_per_sample"],
            shards=tuple(Shard(**shard) for shard in raw["shards"]),
        )
    except (KeyError, TypeError) as error:
        raise UsageError(f"manifest {out / NAME} has a missing, unknown or malformed entry: {error}") from None


def changed(manifest: Manifest, config: Mapping[str, Any]) -> list[str]:
    """The keys by which a configuration differs from that of a manifest, sorted."""
    # The same ladder may be in another folder now; its digest has a key of its own.
    known = {*config, *manifest.config} - {"ladder"}
    return sorted(key for key in known if config.get(key) != manifest.config.get(key))


def check_out(out: Location, config: Mapping[str, Any]) -> Manifest | None:
    """The manifest of an earlier run of the same configuration in `out`, or None for a fresh folder. Writes nothing.

    Raises:
        UsageError: as `check_location`, or if `out` holds something else or a run of another configuration.
        OSError: as `listed`.
    """
    try:
        names = [name for name in own_names(listed(out)) if name != WORK]
    except OSError:
        check_location(out)
        raise
    if names and NAME not in names:
        raise UsageError(
            f"`out` {out} holds something else ({listing(names)}) and no {NAME}; choose an empty or new folder"
        )
    manifest = read_manifest(out) if names else None
    if manifest and manifest.config.get("noise_version") != config.get("noise_version"):
        raise UsageError(
            f"`out` {out} was begun by mlem-dist {manifest.versions.get('mlem_dist')}, whose noise is not that of this "
            "version; finish it with that version, or choose another folder"
        )
    if manifest and (keys := changed(manifest, config)):
        changes = "; ".join(_change(key, manifest.config.get(key), config.get(key)) for key in keys)
        raise UsageError(f"`out` {out} holds a run of another configuration ({changes}); choose another folder")
    # The folder of a finished dataset may be read-only.
    if not (manifest and manifest.shards):
        check_location(out)
    return manifest


def recorded_shards(out: Location, manifest: Manifest) -> list[Shard]:
    """The shards that a run has written, from its manifest or, until the run is finished, from its markers."""
    if manifest.shards:
        return [*manifest.shards]
    marked = marked_shards(out, manifest.fingerprint)
    # Shards that have waited may have their places.
    whole = {shard_index(path): shard for path, shard in whole_shards(out, marked).items()}
    return [whole.get(shard_index(shard.path), shard) for shard in marked]


def written_shards(out: Location, manifest: Manifest) -> dict[str, Shard]:
    """The shards of a run that are as they were written, keyed by path; some may wait for their places."""
    return whole_shards(out, (*manifest.shards, *marked_shards(out, manifest.fingerprint)))


def finished_shards(out: Location, manifest: Manifest) -> dict[str, Shard]:
    """The shards of a run that need not be made again, keyed by path, in their order.

    Shards that wait beside a finished dataset do not count. A run that was stopped has left them.
    """
    written = sorted(written_shards(out, manifest).items(), key=lambda item: Path(item[0]).name)
    return {path: shard for path, shard in written if not (manifest.shards and path.startswith(WORK))}


def finish(out: Location, manifest: Manifest) -> None:
    """Write the card, unless it exists, and the complete manifest, then remove the work folder of unfinished runs."""
    # After a repair the card exists, and the user may have edited it.
    if CARD not in listed(out):
        with reached(out), (out / manifest.shards[0].path).open("rb") as opened:
            columns = pq.read_schema(opened)
        publish(out / CARD, card(manifest, columns), out / WORK)
    manifest.write(out)
    remove_folder(out / WORK)


def card(manifest: Manifest, columns: pa.Schema) -> str:
    """The dataset card: YAML front matter for Hugging Face, then a description for readers.

    `columns` is the schema of the files.
    """
    config = manifest.config
    rows, size = sum(shard.rows for shard in manifest.shards), sum(shard.bytes for shard in manifest.shards)
    # Columns of prompts and scores may be of types that this form lacks; readers take them from the files.
    inferred = manifest.columns or "scores" in config
    named = {} if inferred else {"features": _card_features(manifest.labels)}
    front = {
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
        "dataset_info": named | {"splits": [{"name": "train", "num_examples": rows, "num_bytes": size}]},
        "tags": ["synthetic", "mlem-dist"],
    }
    names = (" ".join(name.replace("|", "\\|").split()) for name in manifest.labels)
    classes = ", ".join(f"{i} {name}" for i, name in enumerate(names))
    num = config.get("num", rows)
    meanings = {
        "sample_id": f"0 ... {num - 1}",
        "image": config.get("image_format", "png").upper(),
        "label": classes,
        "prompt": "what the image shows",
        "negative_prompt": "what it does not show",
        "seed": "decides the image's noise",
        "guidance_scale": "scale of guidance",
        "width": "of the image, in pixels",
        "height": "of the image, in pixels",
    }
    table = dict.fromkeys(manifest.columns, "from the table of prompts")
    scores = dict.fromkeys(columns.names, "score of the image")
    meanings = scores | table | meanings
    described = "".join(f"| {field.name} | {_type_name(field.type)} | {meanings[field.name]} |\n" for field in columns)
    seeds = f"seeds\n{config['seed']} to {config['seed'] + num - 1}"
    seeds += ", where the table of prompts has none" if manifest.columns else ""
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {rows:,} synthetic images from the ladder `{Path(config["ladder"]).name}`

Generated by mlem-dist {manifest.versions["mlem_dist"]} with {config["solver"]}, {config["steps"]} steps, {seeds}.
{_choice(config, rows)}`mlem.json` holds the whole configuration and the SHA-256 of every file.

```python
from datasets import load_dataset
load_dataset("parquet", data_files="data/*.parquet")   # pandas, polars, DuckDB, Ray Data: read `data/`
```

| column | type | meaning |
|---|---|---|
{described}"""


def _choice(config: Mapping[str, Any], rows: int) -> str:
    """Sentences on scores and on rows that are left out, for a dataset of `rows`."""
    scores = f"Scored by {', '.join(config['scores'])}.\n" if "scores" in config else ""
    first = f"the first {rows:,}" if rows == config.get("until") else "those"
    return scores + (f"Of {config['num']:,} images, {first} with `{config['keep']}`.\n" if "keep" in config else "")


def _type_name(kind: pa.DataType) -> str:
    return "struct<bytes, path>" if kind == IMAGE else str(kind)


def _card_features(labels: Sequence[str]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for name, kind in features(labels).items():
        if kind["_type"] == "Value":
            entries.append({"name": name, "dtype": kind["dtype"]})
        elif kind["_type"] == "Image":
            entries.append({"name": name, "dtype": "image"})
        else:
            entries.append(
                {"name": name, "dtype": {"class_label": {"names": {str(i): n for i, n in enumerate(labels)}}}}
            )
    return entries


def _change(key: str, was: Any, now: Any) -> str:
    if key == "plan":
        return (
            "the plan is another one: it follows from `nfe`, `probabilities`, `draw`, `increments` or `plan`, and from "
            "what `ladder measure`, `calibrate` and `tune` have found"
        )
    return f"{key} was {_short(was)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
