"""Constructor arguments that take classes: the ones known here, by class or by name."""

from __future__ import annotations

import functools

from torch import nn

from .attention import Attention
from .block import Block
from .glu_mlp import GluMlp
from .hybrid_embed import HybridEmbed
from .layer_norm import LayerNorm
from .mlp import GELUTanh, Mlp, QuickGELU
from .patch_embed import PatchEmbed
from .res_post_block import ResPostBlock

_TORCH_LAYER_NORM = functools.partial(LayerNorm, eps=1e-5)  # torch.nn.LayerNorm's own default
_KNOWN = {
    "norm_layer": {"LayerNorm": LayerNorm, "layernorm": LayerNorm},
    "embed_norm_layer": {"LayerNorm": LayerNorm, "layernorm": LayerNorm},
    "act_layer": {
        "GELU": nn.GELU, "gelu": nn.GELU,
        "GELUTanh": GELUTanh, "gelu_tanh": GELUTanh,
        "QuickGELU": QuickGELU, "quick_gelu": QuickGELU,
        "SiLU": nn.SiLU, "silu": nn.SiLU,
    },
    "embed_layer": {"PatchEmbed": PatchEmbed, "HybridEmbed": HybridEmbed},
    "block_fn": {"Block": Block, "ResPostBlock": ResPostBlock},
    "mlp_layer": {"Mlp": Mlp, "GluMlp": GluMlp},
    "attn_layer": {"Attention": Attention, "attn": Attention, "": Attention},
}  # fmt: skip


def known(owner: str, argument: str, value, default=None):
    """The class of ours for a name, a class of torch, timm or vitkernels, or a partial of one."""
    if value is None:
        return default
    if isinstance(value, functools.partial):
        if value.args:
            raise ValueError(
                f"{owner}: {argument}: a partial takes keywords only, got {value.args}"
            )
        base = known(owner, argument, value.func)
        return functools.partial(base, **value.keywords) if value.keywords else base
    if value is nn.LayerNorm:
        return _TORCH_LAYER_NORM
    table = _KNOWN[argument]
    name = value if isinstance(value, str) else getattr(value, "__name__", None)
    ours = isinstance(value, str) or (
        isinstance(value, type)
        and value.__module__.split(".")[0] in ("torch", "timm", "vitkernels")
    )
    if ours and name in table:
        return table[name]
    raise ValueError(
        f"{owner}: {argument} must be one of {', '.join(filter(None, table))}, got {value!r}"
    )
