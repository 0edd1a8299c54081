"""Parquet image datasets: schema, shards, manifest, card, exports."""
