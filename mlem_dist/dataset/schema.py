"""The columns of a dataset, as Hugging Face datasets writes and reads them."""

import json
from collections.abc import Sequence

import pyarrow as pa


def schema(labels: Sequence[str], texts: Sequence[str] = ()) -> pa.Schema:
    """The schema: sample_id, image struct<bytes: binary, path: string>, label if there are classes, texts, and seed.

    Texts are the columns with these names, of strings. All others but the image are int64.

    The metadata key `huggingface` names the features, so that `datasets` shows pictures and class names.
    """
    fields = [
        pa.field("sample_id", pa.int64()),
        # Exactly this struct, nullable and in this order: otherwise `datasets` silently loses the Image feature.
        pa.field("image", pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])),
    ]
    if labels:
        fields.append(pa.field("label", pa.int64()))
    fields += [pa.field(name, pa.string()) for name in texts]
    fields.append(pa.field("seed", pa.int64()))
    metadata = {"huggingface": json.dumps({"info": {"features": features(labels, texts)}})}
    return pa.schema(fields, metadata=metadata)


def features(labels: Sequence[str], texts: Sequence[str] = ()) -> dict[str, dict[str, object]]:
    """The columns in the form of Hugging Face's `Features.to_dict()`."""
    columns: dict[str, dict[str, object]] = {
        "sample_id": {"dtype": "int64", "_type": "Value"},
        "image": {"_type": "Image"},
    }
    if labels:
        columns["label"] = {"names": list(labels), "_type": "ClassLabel"}
    for name in texts:
        columns[name] = {"dtype": "string", "_type": "Value"}
    columns["seed"] = {"dtype": "int64", "_type": "Value"}
    return columns
