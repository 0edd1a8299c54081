import json
import logging

from mlem_dist.ladder.images import load_images
from mlem_dist.training.assemble import set_stale_aside, train_ladder


def test_what_was_measured_of_an_earlier_training_is_set_aside(tmp_path, data, configure, caplog):
    images = load_images(data, (1, 8, 8), ["left", "right"])
    out = tmp_path / "out"
    old = train_ladder(configure({"steps": 20}), images, out, lambda *progress: None).digest
    files = {name: json.dumps({"ladder": old, "of": name}) for name in ("calibration.json", "plan-ode-10.json")}
    for name, text in files.items():
        (out / name).write_text(text)
    (out / "plan-mine.json").write_text("[]")
    train_ladder(configure({"steps": 20}), images, out, lambda *progress: None)
    assert all((out / name).exists() for name in files)

    with caplog.at_level(logging.WARNING):
        ladder = train_ladder(configure({"steps": 30}), images, out, lambda *progress: None)
    assert ladder.digest != old
    aside = out / "training" / f"stale-{old[:8]}"
    for name, text in files.items():
        assert not (out / name).exists()
        assert (aside / name).read_text() == text
        assert str(aside / name) in caplog.text
    assert (out / "plan-mine.json").exists()

    # One of the same name is kept as well, and those of this ladder stay.
    (out / "calibration.json").write_text(json.dumps({"ladder": old, "of": "another"}))
    (out / "frontier-ode.json").write_text(json.dumps({"ladder": ladder.digest}))
    set_stale_aside(ladder)
    assert (aside / "calibration.json").read_text() == files["calibration.json"]
    assert json.loads((aside / "2-calibration.json").read_text())["of"] == "another"
    assert (out / "frontier-ode.json").exists()
