import os
import tempfile
from pathlib import Path

import pytest

from mlem_dist.dataset.manifest import check_out
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
