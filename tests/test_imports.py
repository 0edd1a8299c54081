import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("cli", "torch ray pyarrow"),
        ("dataset.manifest", "torch ray"),
        ("solver.integrate", "ray diffusers"),
        ("runtime.coordinator", "torch"),
        ("runtime.writer", "torch"),
    ],
)
def test_what_starts_soon_does_not_wait_for_what_it_does_not_use(module, absent):
    check = f"import sys, mlem_dist.{module}; print(*{{*sys.modules}} & {{*{absent.split()!r}}})"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout == "\n"
