from dataclasses import replace

import pytest

from mlem_dist.api.generation import generate
from mlem_dist.dataset.manifest import read_manifest
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.sizes import ACTIVATION_SHARE, default_block, memory_note, room_beside
from mlem_dist.tuning.comparison import block_size


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_little_memory_makes_blocks_smaller_and_much_makes_none_larger(three, device):
    most = default_block(three, device)
    blocks = {10.0**power: default_block(three, device, 10.0**power) for power in range(5, 13)}
    assert sorted(blocks.values()) == [*blocks.values()]
    assert (blocks[1e5], blocks[1e12]) == (1, most)
    assert 1 < blocks[1e8] < 500
    each, weights = max(three.activation_bytes), float(three.weight_bytes.seconds.sum())
    for memory, block in blocks.items():
        room = room_beside(weights, memory)
        assert block == 1 or block * each <= ACTIVATION_SHARE * room <= memory
        assert bool(memory_note(three, device, memory)) == (each > room)
        tuned = block_size(three, device, memory)
        assert tuned <= block < max(2 * tuned, 2 * most)
        assert block_size(three, device) % tuned == 0


def test_what_a_ladder_tells_of_its_activations_is_what_is_measured(three: Ladder):
    untold = replace(three, levels=tuple(replace(level, activation_bytes=0) for level in three.levels))
    assert untold.activation_bytes == pytest.approx(three.activation_bytes, rel=0.1)
    assert three.activation_bytes[0] == 0
    assert untold.digest == three.digest


def test_a_dataset_keeps_its_sizes_where_memory_would_make_others(three, tmp_path, monkeypatch):
    each, notes = max(three.activation_bytes), []

    def run(memory, out, **sizes):
        monkeypatch.setattr("mlem_dist.models.devices.memory_per_core", lambda: memory)
        arguments = {"num": 20, "nfe": 2, "steps": 8, "engine": "inline", "device": "cpu", "notify": notes.append}
        generate(three, out=str(out), **arguments, **sizes)
        content = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        return read_manifest(out).config["block_size"], content

    block, content = run(16 * each, tmp_path / "small")
    assert 1 < block < 16
    assert run(1e12, tmp_path / "large")[0] == 100
    (tmp_path / "small" / "data" / "train-00000-of-00001.parquet").unlink()
    for sizes in ({}, {"block_size": block}):
        assert run(1e12, tmp_path / "small", **sizes) == (block, content)
    assert not any("memory may run out" in note for note in notes)
    assert run(each, tmp_path / "tiny")[0] == 1
    assert any("memory may run out" in note for note in notes)
