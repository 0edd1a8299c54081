import pytest
import torch

from mlem_dist import api
from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.solver.plan import read_plan, single_level
from mlem_dist.tuning.comparison import PlanComparison
from mlem_dist.tuning.price import STEPS, STEPS_SAMPLES, STEPS_SEED, UNSEEN, reference_steps
from mlem_dist.tuning.tune import FITTING_SAMPLES, affordable_samples, evaluations


def ignored(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def counted(small, monkeypatch):
    """The two lowest levels of the bundled ladder, and a list to which each evaluation of the best adds its samples."""
    ladder, samples = Ladder.load(small), []
    load_level = Ladder.load_level

    def load(self, number, *arguments):
        level = load_level(self, number, *arguments)
        if number == len(ladder.levels):
            level.register_forward_pre_hook(lambda module, inputs: samples.append(len(inputs[0])))
        return level

    monkeypatch.setattr(Ladder, "load_level", load)
    return ladder, samples


@pytest.mark.parametrize(("solver", "nfe"), [("ode", (3,)), ("ode", (12,)), ("sde", (6,))])
def test_a_search_takes_what_was_said_beforehand(counted, tmp_path, solver, nfe):
    """Of the derivatives, the count lacks what is not computed forwards."""
    ladder, samples = counted
    told = []
    api.tune(ladder, out=tmp_path, nfe=nfe, steps=20, solver=solver, device="cpu", notify=told.append)
    price = evaluations(ladder, solver, "cpu", 20, nfe, FITTING_SAMPLES)
    assert 0.35 * price < sum(samples) <= 1.02 * price
    seconds = price * ladder.cost("cpu")[-1]
    assert affordable_samples(ladder, solver, "cpu", 20, nfe, None, 1) == (FITTING_SAMPLES, pytest.approx(seconds))
    assert len(told) == 1
    assert f"images of {nfe[0]} evaluations" in told[0]


def test_a_short_time_leaves_fewer_samples_to_fit_to(small, tmp_path):
    ladder = Ladder.load(small)
    whole = affordable_samples(ladder, "ode", "cpu", 20, (3,), None, 1)[1] / 60
    samples, seconds = affordable_samples(ladder, "ode", "cpu", 20, (3,), whole / 2, 1)
    assert 64 <= samples < FITTING_SAMPLES
    assert 0.3 * whole < seconds / 60 <= whole / 2
    minutes = affordable_samples(ladder, "ode", "cpu", 20, (3,), whole / 2, 2)[1] / 60
    rows, _ = api.tune(small, out=tmp_path / "out", nfe=(3,), steps=20, device="cpu", minutes=max(minutes, whole / 2))
    assert "fitted" in {row.family for row in rows}
    with pytest.raises(UsageError, match=r"`minutes` 1e-06: the search takes about .* at least"):
        api.tune(small, out=tmp_path / "none", nfe=(3,), steps=20, device="cpu", minutes=1e-6)
    with pytest.raises(UsageError, match=r"`minutes` -1: expected a positive number"):
        api.tune(small, out=tmp_path / "none", minutes=-1)
    assert not (tmp_path / "none").exists()


def test_the_reference_has_as_many_steps_as_are_needed(flow):
    ladder = flow
    steps = reference_steps(ladder, "ode", "cpu", ignored)

    def change(steps: int) -> float:
        finer = PlanComparison(ladder, "ode", "cpu", 2 * steps, STEPS_SAMPLES, STEPS_SEED)
        return float(finer.errors([single_level(2, 2, steps)]).mean() / finer.reference.var())

    assert steps in STEPS[1:]
    at = STEPS.index(steps)
    assert change(steps) <= UNSEEN or at == len(STEPS) - 1
    assert not at or change(STEPS[at - 1]) > UNSEEN


def test_plans_bring_their_steps_along(many, tmp_path):
    """Tuned without a number of steps, and used without one."""
    told = []
    api.tune(many, out=many.folder, nfe=(3,), device="cpu", solver="sde", notify=told.append)
    steps = reference_steps(many, "sde", "cpu", ignored)
    assert told[0].startswith(f"Plans have {steps} `steps`")
    plan = read_plan(many.folder / "plan-sde-3.json", many.digest, 2, "sde", steps)
    assert steps != 250
    images = api.sample(many, num=4, nfe=3, solver="sde")
    assert torch.equal(*map(torch.from_numpy, (images, api.sample(many, num=4, plan=plan, solver="sde"))))
    assert (images == api.sample(many, num=4, nfe=3, solver="sde", steps=steps)).all()
