import os
import tempfile
from pathlib import Path

import pytest

from mlem_dist.dataset.manifest import Manifest, check_out
from mlem_dist.errors import UsageError

NOBODY = 65534


def test_a_folder_without_write_permission_is_refused():
    with tempfile.TemporaryDirectory() as name:
        locked, hidden = Path(name) / "locked", Path(name) / "hidden"
        Path(name).chmod(0o755)
        locked.mkdir(mode=0o555)
        hidden.mkdir(mode=0o700)
        root = os.geteuid() == 0
        hidden.chmod(0o700 if root else 0o000)
        try:
            if root:  # who may write anywhere
                os.seteuid(NOBODY)
            for out in (locked, locked / "a" / "b", hidden / "a" / "b"):
                with pytest.raises(UsageError, match="cannot be written"):
                    check_out(out, {})
        finally:
            if root:
                os.seteuid(0)
            hidden.chmod(0o700)


def test_a_run_goes_on_where_its_ladder_has_moved(tmp_path):
    Manifest({"ladder": "/a/mine", "digest": "1", "seed": 0}, (), {}, {}, ()).write(tmp_path)
    found = check_out(tmp_path, {"ladder": "/b/mine", "digest": "1", "seed": 0})
    assert found
    assert found.config["ladder"] == "/a/mine"
    with pytest.raises(UsageError, match="digest was"):
        check_out(tmp_path, {"ladder": "/a/mine", "digest": "2", "seed": 0})
