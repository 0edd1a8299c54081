"""Families: how models of each class of diffusers are called. A module adds a family; see `family.Family`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlem_dist.errors import UsageError
from mlem_dist.models.families.chroma import Chroma
from mlem_dist.models.families.dit import DiT
from mlem_dist.models.families.family import Family
from mlem_dist.models.families.flux import Flux
from mlem_dist.models.families.pixart import PixArt
from mlem_dist.models.families.sana import Sana
from mlem_dist.models.families.sit import SiT
from mlem_dist.models.families.stable_diffusion import ConditionalUNet
from mlem_dist.models.families.stable_diffusion_3 import SD3
from mlem_dist.models.families.unet import UNet

FAMILIES: Mapping[str, Family] = {
    name: family
    for family in (UNet(), DiT(), SiT(), ConditionalUNet(), SD3(), Flux(), Chroma(), PixArt(), Sana())
    for name in family.names
}
"""The families by the names of their models' classes."""


def family_of(kind: str, where: str) -> Family:
    """The family of models of the class `kind`; `where` names the model in the message.

    Raises:
        UsageError: if there is no family for the class.
    """
    if kind not in FAMILIES:
        known = sorted(name for name in FAMILIES if name != "unet")
        raise UsageError(f"{where}: its class is {kind!r}, expected one of {', '.join(known)}")
    return FAMILIES[kind]


def config_kind(config: Mapping[str, Any]) -> str:
    """The name of the class in a model's configuration.

    Configurations of PixArt may name the class `Transformer2DModel`, of which its model was a part.
    """
    kind = str(config.get("_class_name"))
    return PixArt.names[0] if kind == "Transformer2DModel" and config.get("norm_type") == "ada_norm_single" else kind
