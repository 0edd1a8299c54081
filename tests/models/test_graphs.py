import pytest
import torch

from mlem_dist.ladder.ladder import Ladder
from mlem_dist.models.graphs import Graphed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.inference_mode()
def test_graphs_return_what_their_levels_do_at_every_batch_size_and_time_in_any_order():
    ladder = Ladder.load("fashion")
    levels = [ladder.load_level(k, "cuda") for k in (1, 2, 3)]
    cases = []
    for batch, time in ((8, 900), (3, 500), (8, 10)):
        x = torch.randn(batch, 1, 32, 32, device="cuda")
        condition = {"label": torch.arange(batch, device="cuda") % 10}
        cases.append((x, torch.full((batch,), time, device="cuda"), condition))

    def values(levels):
        # Of each by itself, then of those that take the first one's.
        alone = [level(*case) for case in cases for level in levels]
        return alone + [level(*case, {1: levels[0](*case)}) for case in cases for level in levels[1:]]

    expected = values(levels)
    for _ in range(2):
        # The second time all graphs of the first are gone.
        graphed = [Graphed(level) for level in levels]
        for one, other in zip(values(graphed), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
