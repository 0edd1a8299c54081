import pytest

from mlem_dist import api


@pytest.mark.parametrize("draw", ["quantiles", "systematic"])
def test_an_image_is_made_again_by_the_plan_of_its_block(tmp_path, draw, monkeypatch):
    monkeypatch.chdir(tmp_path)
    api.generate(num=20, out="out", steps=20, nfe=2, draw=draw, block_size=5, shard_size=10, engine="inline")
    remade = api.remake("out", 13)
    assert remade.difference.max() <= 1
    assert remade.row == {"sample_id": 13, "label": 3, "seed": 13}
    assert (tmp_path / "remake-13.png").read_bytes().startswith(b"\x89PNG")
    assert "manual_seed(13)" in remade.lines
    if draw == "systematic":
        # By the plan of another block it would be another image.
        other = api.sample(num=1, labels=[3], seed=13, steps=20, nfe=2)
        assert abs(remade.stored.astype(int) - other[0]).max() > 1
