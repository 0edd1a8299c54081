import pytest

from mlem_dist import api
from mlem_dist.errors import UsageError


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


@pytest.mark.parametrize(("kind", "magic"), [("jpeg", b"\xff\xd8\xff"), ("webp", b"RIFF")])
def test_images_may_be_of_formats_that_lose_something(tmp_path, kind, magic):
    import pyarrow.parquet as pq

    given = {"num": 4, "steps": 4, "nfe": 1, "engine": "inline", "image_format": kind}
    api.generate(out=str(tmp_path / "out"), **given)
    api.generate(out=str(tmp_path / "small"), image_quality=20, **given)
    files, small = (
        [image["bytes"] for image in pq.read_table(tmp_path / name / "data")["image"].to_pylist()]
        for name in ("out", "small")
    )
    assert all(file.startswith(magic) for file in files)
    assert sum(map(len, small)) < 0.8 * sum(map(len, files))
    remade = api.remake(str(tmp_path / "out"), 3, out=tmp_path / "3.png")
    assert remade.difference.max() <= 1
    for changed, message in (
        ({"image_quality": 101}, "expected 1 to 100"),
        ({"image_format": "png"}, "another config"),
    ):
        with pytest.raises(UsageError, match=message):
            api.generate(out=str(tmp_path / "small"), **given | changed)
    with pytest.raises(UsageError, match="a PNG has no quality"):
        api.generate(out=str(tmp_path / "none"), num=1, image_quality=90)
