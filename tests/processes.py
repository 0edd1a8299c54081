"""Small processes for tests."""

import numpy as np

from mlem_dist.solver.process import BetaProcess


def process_of_betas(betas: np.ndarray) -> BetaProcess:
    return BetaProcess({"num_train_timesteps": len(betas), "trained_betas": betas.tolist()})


def process_of_products(alpha_bar: np.ndarray) -> BetaProcess:
    return process_of_betas(1 - alpha_bar / np.append(1.0, alpha_bar[:-1]))
