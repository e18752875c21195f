"""Google's JAX checkpoints of hybrids (.npz: original, augreg) -> timm's names."""

from __future__ import annotations

import re

from torch import Tensor

from . import jax
from .hybrid_shapes import BACKBONE, NAME

ROOT = "conv_root/kernel"

_UNIT = re.compile(r"^block(\d+)/unit(\d+)/(conv|gn)(\d|_proj)/(kernel|scale|bias)$")
_ROOT = {
    "conv_root/kernel": "conv.weight",
    "gn_root/scale": "norm.weight",
    "gn_root/bias": "norm.bias",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def timm_state(loader: str, origin: str, arrays: dict[str, Tensor]) -> tuple[dict, dict]:
    """(state with timm's names, hints): convolutions are HWIO, norms may be (1, 1, 1, C)."""
    prefix = jax.jax_prefix(arrays) or ""
    short = {key.removeprefix(prefix): key for key in arrays if key.startswith(prefix)}
    stem = BACKBONE if not any(_UNIT.match(name) for name in short) else f"{BACKBONE}stem."
    state, rest = {}, dict(arrays)
    for name, key in short.items():
        renamed = stem + _ROOT[name] if name in _ROOT else _unit(name)
        if renamed is not None:
            array = rest.pop(key)
            state[renamed] = (
                array.permute(3, 2, 0, 1) if name.endswith("kernel") else array.flatten()
            )
    encoder, hints = jax.timm_state(loader, origin, rest, NAME)
    return {**state, **encoder}, hints


def _unit(name: str) -> str | None:
    """block1/unit2/conv3/kernel -> patch_embed.backbone.stages.0.blocks.1.conv3.weight."""
    match = _UNIT.match(name)
    if match is None:
        return None
    stage, block = int(match[1]) - 1, int(match[2]) - 1
    kind = "conv" if match[3] == "conv" else "norm"
    module = f"downsample.{kind}" if match[4] == "_proj" else f"{kind}{match[4]}"
    return f"{BACKBONE}stages.{stage}.blocks.{block}.{module}.{_LEAVES[match[5]]}"
