import importlib
import json
import sys
from types import ModuleType

import numpy as np
import pytest

from mlem_dist.errors import UsageError
from mlem_dist.solver.process import process_of
from mlem_dist.solver.schedulers import BETA_SCHEDULERS, DEFAULTS, SAMPLING, alpha_bar


@pytest.fixture
def scheduler_class_of(monkeypatch):
    """A function that finds a scheduler class by its name, also where the library that its steps need is not there."""
    modules = {"DPMSolverSDEScheduler": "dpmsolver_sde", "LMSDiscreteScheduler": "lms_discrete"}

    def find(name):
        monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
        where = importlib.import_module(
            f"diffusers.schedulers.scheduling_{modules[name]}" if name in modules else "diffusers"
        )
        return getattr(where, name)

    return find


@pytest.mark.filterwarnings("ignore:__array")
@pytest.mark.parametrize("name", BETA_SCHEDULERS)
def test_the_schedule_of_a_class_is_that_of_diffusers(scheduler_class_of, tmp_path, name):
    """As the class saves it, and by its defaults where there is its name alone."""
    scheduler = scheduler_class_of(name)()
    scheduler.save_config(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == name
    # Diffusers computes in float32, and what is left of 1 after a beta of 0.999 has three digits less.
    precision = 2e-5 if saved["beta_schedule"] == "squaredcos_cap_v2" else 1e-6
    for config in (saved, {"_class_name": name}):
        np.testing.assert_allclose(alpha_bar(config), scheduler.alphas_cumprod, rtol=precision)


@pytest.mark.parametrize(
    "name",
    [
        "CMStochasticIterativeScheduler",
        "CogVideoXDDIMScheduler",
        "CogVideoXDPMScheduler",
        "FlowMatchLCMScheduler",
        "IPNDMScheduler",
        "LTXEulerAncestralRFScheduler",
        "SCMScheduler",
    ],
)
def test_a_class_whose_schedule_is_not_known_is_refused(scheduler_class_of, tmp_path, name):
    scheduler_class_of(name)().save_config(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    with pytest.raises(UsageError, match=f"noise schedule: _class_name is '{name}', expected .* schedule is known"):
        process_of(config)


@pytest.mark.parametrize(
    "name",
    ["EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "FlowMatchHeunDiscreteScheduler", "ScoreSdeVeScheduler"],
)
def test_a_configuration_that_has_lost_its_class_is_refused(scheduler_class_of, tmp_path, name):
    scheduler_class_of(name)().save_config(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert process_of(config)
    del config["_class_name"]
    with pytest.raises(UsageError, match=r"noise schedule: (sigma_min is|the key)"):
        process_of(config)


@pytest.mark.parametrize(
    ("key", "value", "neutral"),
    [
        ("predict_epsilon", False, True),
        ("snr_shift_scale", 3.0, 1.0),
        ("use_flow_sigmas", True, False),
        ("flow_shift", 3.0, 1.0),
        ("use_dynamic_shifting", True, False),
        ("shift_terminal", 0.1, None),
        ("sigma_max", 700.0, None),
        ("timestep_type", "continuous", "discrete"),
    ],
)
def test_a_key_that_makes_it_another_schedule_is_refused(key, value, neutral):
    with pytest.raises(UsageError, match=f"noise schedule: {key} is .*, expected "):
        alpha_bar({"_class_name": "DDIMScheduler", key: value})
    assert np.array_equal(alpha_bar({key: neutral}), alpha_bar({}))


def test_keys_of_sampling_change_nothing_and_unknown_ones_are_refused():
    """One that is misspelt would be left out in silence."""
    config = dict.fromkeys(SAMPLING, "some") | {"_diffusers_version": "0.30.0", "_class_name": None}
    assert np.array_equal(alpha_bar(config), alpha_bar(DEFAULTS))
    for key in ("beta_ends", "shift"):
        with pytest.raises(UsageError, match=f"noise schedule: the key '{key}' is unknown"):
            alpha_bar({key: 0.02})
