import pytest
import torch

from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.levels import UNetLevel
from mlem_dist.runtime.graphs import Graphed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.inference_mode()
def test_a_graph_returns_what_the_model_does_at_every_batch_size_and_time():
    level = Ladder.load("fashion").load_level(2, "cuda")
    assert isinstance(level, UNetLevel)
    cases = []
    for batch, time in ((8, 900), (3, 500), (8, 10)):
        x = torch.randn(batch, 1, 32, 32, device="cuda")
        cases.append((x, torch.full((batch,), time, device="cuda"), torch.arange(batch, device="cuda")))
    expected = [level(*case) for case in cases]
    level.model = Graphed(level.model)
    found = [level(*case) for case in cases]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
