"""Weight initialisation of the ViT family: timm's schemes and draws; one seed, the same weights."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..nn.trunc_normal import trunc_normal_

SCHEMES = ("", "reset", "jax", "jax_nlhb", "moco")


def init_weights(model: nn.Module, scheme: str, *, reset: bool) -> None:
    """Children before parents, in order of registration.

    "": truncated normal 0.02 for every Linear; "jax", "jax_nlhb" (head bias -log classes): as Flax;
    "moco": Xavier with q, k, v apart; "reset": each module's own. `reset`: others too.
    """
    head_bias = -math.log(model.num_classes) if scheme == "jax_nlhb" else 0.0
    for name, child in _children_first(model, ""):
        if isinstance(child, nn.Linear) and scheme != "reset":
            _LINEAR[scheme.removesuffix("_nlhb")](child, name, head_bias)
        elif isinstance(child, nn.Conv2d) and scheme.startswith("jax"):
            _lecun_normal(child.weight)
            _zero(child.bias)
        elif hasattr(child, "init_weights") and scheme != "reset":  # ResPostBlock, GluMlp
            child.init_weights()
        elif reset and hasattr(child, "reset_parameters"):
            child.reset_parameters()


def _children_first(module: nn.Module, prefix: str):
    for name, child in module.named_children():
        if child is getattr(module, "keeps_weights_of", None):  # a backbone that was handed in
            continue
        yield from _children_first(child, f"{prefix}{name}.")
        yield f"{prefix}{name}", child


def _timm(linear: nn.Linear, name: str, head_bias: float) -> None:
    trunc_normal_(linear.weight, std=0.02)
    _zero(linear.bias)


def _jax(linear: nn.Linear, name: str, head_bias: float) -> None:
    if name.startswith("head"):
        nn.init.zeros_(linear.weight)
        nn.init.constant_(linear.bias, head_bias)
        return
    nn.init.xavier_uniform_(linear.weight)
    if linear.bias is not None and "mlp" in name:
        nn.init.normal_(linear.bias, std=1e-6)
    else:
        _zero(linear.bias)


def _moco(linear: nn.Linear, name: str, head_bias: float) -> None:
    if "qkv" in name:  # q, k and v are three matrices
        bound = math.sqrt(6.0 / (linear.weight.shape[0] // 3 + linear.weight.shape[1]))
        nn.init.uniform_(linear.weight, -bound, bound)
    else:
        nn.init.xavier_uniform_(linear.weight)
    _zero(linear.bias)


_LINEAR = {"": _timm, "jax": _jax, "moco": _moco}


def _lecun_normal(weight: torch.Tensor) -> None:
    fan_in = weight[0].numel()
    std = math.sqrt(1.0 / fan_in) / 0.87962566103423978  # std of the normal truncated to (-2, 2)
    with torch.no_grad():
        trunc_normal_(weight, std=1.0).mul_(std)


def _zero(bias: torch.Tensor | None) -> None:
    if bias is not None:
        nn.init.zeros_(bias)
