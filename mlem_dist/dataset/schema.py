"""The columns of a dataset, as Hugging Face datasets writes and reads them."""

import json
from collections.abc import Sequence

import pyarrow as pa

SEED, SCALE = "seed", "guidance_scale"

# Exactly this struct, nullable and in this order: otherwise `datasets` silently loses the Image feature.
IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])


def schema(labels: Sequence[str], table: pa.Schema | None = None, scores: Sequence[pa.Field] = ()) -> pa.Schema:
    """The schema: sample_id, image struct<bytes: binary, path: string>, label if there are classes, and seed.

    For images of a table of prompts, its columns stand after the image, as they are. Its columns of seeds and guidance
    scales, if any, come after them, then width and height. All others but the image are int64. Columns of scores are
    the last ones.

    The metadata key `huggingface` names the features, so that `datasets` shows pictures and class names. It infers the
    features that are not named.
    """
    fields = [
        pa.field("sample_id", pa.int64()),
        pa.field("image", IMAGE),
    ]
    if labels:
        fields.append(pa.field("label", pa.int64()))
    if table is not None:
        fields += [field for field in table if field.name not in (SEED, SCALE)]
    fields.append(pa.field(SEED, pa.int64()))
    if table is not None:
        fields += [pa.field(SCALE, pa.float64())] * (SCALE in table.names)
        fields += [pa.field(name, pa.int64()) for name in ("width", "height")]
    fields += scores
    named = features(labels) if table is None else {"image": features(())["image"]}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": named}})})


def features(labels: Sequence[str]) -> dict[str, dict[str, object]]:
    """The columns of a dataset without prompts in the form of Hugging Face's `Features.to_dict()`."""
    columns: dict[str, dict[str, object]] = {
        "sample_id": {"dtype": "int64", "_type": "Value"},
        "image": {"_type": "Image"},
    }
    if labels:
        columns["label"] = {"names": list(labels), "_type": "ClassLabel"}
    return columns | {SEED: {"dtype": "int64", "_type": "Value"}}
