import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest

from mlem_dist.dataset.manifest import Manifest, check_out
from mlem_dist.dataset.shards import Shard, foreign, marked_shards, place_shard, whole_shards
from mlem_dist.errors import UsageError

NOBODY = 65534


def test_a_folder_without_write_permission_is_refused():
    with tempfile.TemporaryDirectory() as name:
        locked, hidden = Path(name) / "locked", Path(name) / "hidden"
        Path(name).chmod(0o755)
        locked.mkdir(mode=0o555)
        hidden.mkdir(mode=0o700)
        finished, begun = Path(name) / "finished", Path(name) / "begun"
        Manifest({}, (), {}, {}, (Shard("data/x", 1, 1, ""),)).write(finished)
        Manifest({}, (), {}, {}, ()).write(begun)
        root = os.geteuid() == 0
        hidden.chmod(0o700 if root else 0o000)
        for folder in (finished, begun):
            folder.chmod(0o555)
        try:
            if root:  # who may write anywhere
                os.seteuid(NOBODY)
            for out in (locked, locked / "a" / "b", hidden / "a" / "b", begun, Path(name) / ("x" * 300)):
                with pytest.raises(UsageError, match="cannot be written"):
                    check_out(out, {})
            # Nothing is to be written there.
            assert check_out(finished, {})
        finally:
            if root:
                os.seteuid(0)
            for folder in (hidden, finished, begun):
                folder.chmod(0o700)


def test_an_unreadable_marker_is_that_of_a_shard_to_make_again(tmp_path):
    (tmp_path / ".mlem").mkdir()
    other, none = (json.dumps({"path": path, "rows": 1, "bytes": 1, "sha256": ""}) for path in ("data/train-a", None))
    markers = {"a": "", "b": "[]", "c": '{"path": "data/x"}', "d": '"x"', "e": other, "f": none}
    for name, text in markers.items():
        (tmp_path / f".mlem/train-{name}.json").write_text(text)
    assert marked_shards(tmp_path, "this") == []


def test_shards_are_whole_by_their_size_and_all_else_is_foreign(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a").write_bytes(b"123")
    (data / "b").write_bytes(b"12")
    (data / "folder").mkdir()
    (data / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "elsewhere").write_bytes(b"1234")
    (data / "c").symlink_to(tmp_path / "elsewhere")
    shards = [Shard(f"data/{name}", 1, size, "") for name, size in (("a", 3), ("b", 3), ("c", 4), ("d", 0))]
    assert list(whole_shards(tmp_path, shards)) == ["data/a", "data/c"]
    assert foreign(tmp_path, shards) == ["data/folder", "data/link"]
    assert whole_shards(tmp_path / "nothing", shards) == {}


def test_any_number_of_markers_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("mlem_dist.store.BATCH", 3)
    (tmp_path / ".mlem").mkdir()
    shards = [Shard(f"data/train-{i}", 1, i, "") for i in range(8)]
    # Those of an earlier version do not say of which run they are.
    for i, shard in enumerate(shards):
        of = {"run": "this"} if i % 2 else {}
        (tmp_path / f".mlem/train-{i}.json").write_text(json.dumps(of | asdict(shard)))
    assert marked_shards(tmp_path, "this") == shards
    assert marked_shards(tmp_path, "another") == shards[::2]


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    """A limit on the size of files, in a process of its own."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from mlem_dist.files import replace_file;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        "replace_file(Path(sys.argv[1]), b'x' * 2000)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], capture_output=True, text=True)
    assert f"OSError: {tmp_path}/file cannot be written: File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_run_goes_on_where_its_ladder_has_moved(tmp_path):
    Manifest({"ladder": "/a/mine", "digest": "1", "seed": 0}, (), {}, {}, ()).write(tmp_path)
    found = check_out(tmp_path, {"ladder": "/b/mine", "digest": "1", "seed": 0})
    assert found
    assert found.config["ladder"] == "/a/mine"
    with pytest.raises(UsageError, match="digest was"):
        check_out(tmp_path, {"ladder": "/a/mine", "digest": "2", "seed": 0})


def test_a_dataset_with_the_noise_of_an_earlier_version_is_not_gone_on_with(tmp_path):
    Manifest({"digest": "1", "seed": 0}, (), {"mlem_dist": "0.3.0"}, {}, ()).write(tmp_path)
    with pytest.raises(UsageError, match=r"was begun by mlem-dist 0\.3\.0, whose noise is not that of this version"):
        check_out(tmp_path, {"digest": "1", "seed": 0, "noise_version": 2})


def test_a_shard_that_another_run_has_moved_has_its_place(tmp_path):
    (tmp_path / ".mlem").mkdir()
    (tmp_path / ".mlem" / "train-00000.parquet").write_bytes(b"rows")
    waiting = Shard(".mlem/train-00000.parquet", 1, 4, "")
    placed = place_shard(tmp_path, waiting, "data/train-00000-of-00001.parquet", 1)
    assert place_shard(tmp_path, waiting, placed.path, 1) == placed
    assert (tmp_path / placed.path).read_bytes() == b"rows"
    with pytest.raises(FileNotFoundError):
        place_shard(tmp_path, waiting, "data/train-00000-of-00002.parquet", 1)
