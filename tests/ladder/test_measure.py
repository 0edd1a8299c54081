import json
import shutil

from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.measure import measure_costs


def test_measuring_changes_the_seconds_alone(tmp_path, fashion):
    """Also of a ladder that other programs wrote: another value range, other keys, in another order."""
    folder = tmp_path / "ladder"
    shutil.copytree(fashion.folder, folder)
    raw = json.loads((folder / "ladder.json").read_text())
    raw |= {"value_range": [0, 1], "levels": raw["levels"][:1], "author": "me"}
    raw = dict(reversed(raw.items()))
    (folder / "ladder.json").write_text(json.dumps(raw))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    digest = Ladder.load(folder).digest
    measured = measure_costs(Ladder.load(folder))
    assert measured.digest == digest
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed == {"ladder.json"}
    assert {path for path in folder.rglob("*") if path.is_file()} == {*before}
    found = json.loads((folder / "ladder.json").read_text())
    assert list(found) == list(raw)
    seconds = found["levels"][0].pop("seconds")
    assert seconds["cpu"] != raw["levels"][0].pop("seconds")["cpu"]
    assert found == raw
