"""The public functions, which have the names of the commands of the command line."""

from mlem_dist.api.arguments import load_ladder
from mlem_dist.api.datasets import export, read, show, verify
from mlem_dist.api.generation import draw, generate, preview, sample
from mlem_dist.api.ladders import calibrate, measure, train, tune
from mlem_dist.api.planning import capacity
from mlem_dist.api.remaking import remake

__all__ = [
    "calibrate",
    "capacity",
    "draw",
    "export",
    "generate",
    "load_ladder",
    "measure",
    "preview",
    "read",
    "remake",
    "sample",
    "show",
    "train",
    "tune",
    "verify",
]
