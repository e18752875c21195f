"""From a state dict with timm's names to a FusedViT: settings from shapes, all checks, copies."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import warnings

import torch
from torch import Tensor, nn

from ..models.init import trunc_normal_
from ..nn import GluMlp, LayerNorm
from ..nn.patch_embed import pair
from ..nn.resample import resample_patch_embed, resample_pos_embed

State = dict[str, Tensor]

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# Heads do not show in the shapes. Width / 64, but for timm's models that are known to differ
# (SO400M, huge, giant, SigLIP's giant, gigantic).
HEADS = {1152: 16, 1280: 16, 1408: 16, 1536: 16, 1664: 16}
BICUBIC = {"mode": "bicubic", "antialias": True}
BILINEAR = {"mode": "bilinear", "antialias": False}  # timm's choice for JAX checkpoints


def build(
    cls,
    loader: str,
    origin: str,
    state: State,
    hints: dict,
    overrides: dict,
    *,
    keep_requires_grad: bool = False,
    resampling: dict = BICUBIC,
) -> nn.Module:
    """A model with copies of `state`, evaluating. Nothing is made when anything does not fit.

    hints: what the source says beside its shapes; overrides: the caller's constructor arguments.
    """
    where = {key: overrides[key] for key in ("device", "dtype") if overrides.get(key) is not None}
    overrides = {key: value for key, value in overrides.items() if key not in ("device", "dtype")}
    with one_sentence(loader, origin):
        found = settings_from_shapes(loader, origin, state, {**hints, **overrides})
    found = {**found, **hints}
    settings = {**found, **overrides}
    fresh_head = settings["num_classes"] != found["num_classes"]
    if fresh_head:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    head = {"num_classes": 0 if fresh_head else settings["num_classes"]}
    try:
        model = cls(**{**settings, **head}, weight_init="skip", device="meta").eval()
    except ValueError as error:
        raise ValueError(f"{loader}: {origin}: {error}") from error
    state = _fit_sizes(loader, origin, model, state, overrides, resampling)
    check_fit(loader, origin, model, state)
    copies = {key: value.detach().clone(memory_format=torch.contiguous_format)
              for key, value in state.items()}  # fmt: skip
    model.load_state_dict(copies, strict=True, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(state[name].requires_grad if keep_requires_grad else True)
    if fresh_head:
        model.reset_classifier(settings["num_classes"])
        if settings["num_classes"] > 0:
            trunc_normal_(model.head.weight.data, std=0.02)
            nn.init.zeros_(model.head.bias)
    return model.to(**where) if where else model


def settings_from_shapes(loader: str, origin: str, state: State, known: dict) -> dict:
    """Constructor arguments that shapes and names tell; `known` ones need not be told."""
    weight = _need(loader, origin, state, "patch_embed.proj.weight", 4)
    width, in_chans, *patch = weight.shape
    fc1 = _need(loader, origin, state, "blocks.0.mlp.fc1.weight", 2)
    blocks = [int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))]
    class_token, reg_token = state.get("cls_token"), state.get("reg_token")
    reg_tokens = 0 if reg_token is None else reg_token.shape[1]
    fc_norm, norm = "fc_norm.weight" in state, "norm.weight" in state
    head = state.get("head.weight")
    settings = {
        "patch_size": tuple(patch),
        "in_chans": in_chans,
        "num_classes": 0 if head is None else head.shape[0],
        "embed_dim": width,
        "depth": 1 + max(blocks),
        "mlp_ratio": (fc1.shape[0] + 0.5) / width,  # survives int(width * ratio)
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "scale_attn_norm": "blocks.0.attn.norm.weight" in state,
        "scale_mlp_norm": "blocks.0.mlp.norm.weight" in state,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in state else None,
        "class_token": class_token is not None,
        "reg_tokens": reg_tokens,
        "pre_norm": "norm_pre.weight" in state,
        "embed_norm_layer": "layernorm" if "patch_embed.norm.weight" in state else None,
        "final_norm": norm or fc_norm,
        "fc_norm": fc_norm,
        "global_pool": "token" if class_token is not None and not fc_norm else "avg",
        "pos_embed": "learn" if "pos_embed" in state else "none",
    }
    if _gated(state):  # SwiGLU
        settings["mlp_layer"] = functools.partial(GluMlp, gate_last=False)
        settings["act_layer"] = nn.SiLU
    if settings["pre_norm"]:  # CLIP
        settings["norm_layer"] = functools.partial(LayerNorm, eps=1e-5)
    if "num_heads" not in known:
        settings["num_heads"] = _heads(loader, origin, state, width)
    prefix = int(class_token is not None) + reg_tokens
    positions = state["pos_embed"].shape[1] if "pos_embed" in state else 0
    class_positions = _class_positions(positions, prefix, tuple(patch), known)
    if positions and "img_size" not in known:
        patches = max(0, positions - prefix * class_positions)
        side = math.isqrt(patches)
        if side == 0 or side * side != patches:
            raise ValueError(
                f"{loader}: {origin}: {positions} positions are no square grid: name img_size"
            )
        settings["img_size"] = (side * patch[0], side * patch[1])
    settings["no_embed_class"] = prefix > 0 and not class_positions
    return settings


def _class_positions(positions: int, prefix: int, patch: tuple[int, int], known: dict) -> bool:
    """Whether prefix tokens have positions too: where that fits the image size, or a square."""
    if "no_embed_class" in known:
        return not known["no_embed_class"]
    if "img_size" in known:
        patch = pair(known.get("patch_size", patch))
        grid = math.prod(s // p for s, p in zip(pair(known["img_size"]), patch, strict=True))
        if positions in (grid, grid + prefix):
            return positions != grid
    return math.isqrt(positions) ** 2 != positions


def _gated(state: State) -> bool:
    """Whether fc1 holds two products, one the gate of the other."""
    fc1, fc2 = state["blocks.0.mlp.fc1.weight"], state.get("blocks.0.mlp.fc2.weight")
    return fc2 is not None and fc1.shape[0] == 2 * fc2.shape[-1]


def _heads(loader: str, origin: str, state: State, width: int) -> int:
    q_norm = state.get("blocks.0.attn.q_norm.weight")
    known = width in HEADS and not _gated(state)
    heads, rest = (HEADS[width], 0) if known else divmod(width, 64)
    if q_norm is not None:
        heads, rest = divmod(width, q_norm.shape[0])
    if rest:
        raise ValueError(
            f"{loader}: {origin}: the number of heads does not show in its shapes, and the width"
            f" {width} is no multiple of 64: name num_heads"
        )
    return heads


def _fit_sizes(
    loader: str, origin: str, model: nn.Module, state: State, overrides: dict, resampling: dict
) -> State:
    """The image size, patch size and channels that the caller named, resampled as timm does it."""
    state = dict(state)
    conv = model.patch_embed.proj
    if "in_chans" in overrides:
        state["patch_embed.proj.weight"] = _channels(
            state["patch_embed.proj.weight"], conv.in_channels
        )
    if "patch_size" in overrides:
        state["patch_embed.proj.weight"] = resample_patch_embed(
            state["patch_embed.proj.weight"], conv.kernel_size, **resampling
        )
    positions = state.get("pos_embed")
    if positions is None or model.pos_embed is None or positions.shape == model.pos_embed.shape:
        return state
    if "img_size" in overrides or "patch_size" in overrides:
        tokens = 0 if model.no_embed_class else model.num_prefix_tokens
        grid = math.isqrt(max(0, positions.shape[1] - tokens))
        if grid * grid != positions.shape[1] - tokens:
            raise ValueError(
                f"{loader}: {origin}: {positions.shape[1]} positions are no square grid to resample"
            )
        state["pos_embed"] = resample_pos_embed(
            positions, model.patch_embed.grid_size, (grid, grid), tokens, **resampling
        )
    return state


def _channels(weight: Tensor, in_chans: int) -> Tensor:
    """A projection of RGB for other channels: their sum for one, else repeated and rescaled."""
    if weight.shape[1] != 3 or in_chans == 3:
        return weight
    if in_chans == 1:
        return weight.float().sum(dim=1, keepdim=True).to(weight.dtype)
    repeated = weight.float().repeat(1, math.ceil(in_chans / 3), 1, 1)[:, :in_chans]
    return (repeated * (3 / in_chans)).to(weight.dtype)


def check_fit(loader: str, origin: str, model: nn.Module, state: State) -> None:
    """One sentence when names or shapes differ from the model's."""
    expected = model.state_dict()
    both = [(key, state[key], value) for key, value in expected.items() if key in state]
    wrong = [
        f"{key} is {tuple(got.shape)} where {tuple(value.shape)} is expected"
        for key, got, value in both
        if got.shape != value.shape
    ]
    whole_numbers = [
        f"{key} is {got.dtype} where a floating dtype is expected"
        for key, got, _ in both
        if not got.is_floating_point()
    ]
    problems = [
        _list("missing ", [key for key in expected if key not in state]),
        _list("not expected: ", [key for key in state if key not in expected]),
        _list("", wrong),
        _list("", whole_numbers),
    ]
    if any(problems):
        raise ValueError(
            f"{loader}: {origin} does not fit FusedViT: {'; '.join(filter(None, problems))}"
        )


def warn_of_ignored(loader: str, keys: list[str], what: str) -> None:
    if keys:
        warnings.warn(f"{loader}: {', '.join(keys)} ignored: FusedViT has no {what}", stacklevel=6)


@contextlib.contextmanager
def one_sentence(loader: str, origin: str):
    """What goes wrong while tensors of unexpected ranks are read, as an error about the file."""
    try:
        yield
    except (IndexError, RuntimeError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{loader}: {origin} does not fit FusedViT: {reason}") from error


def _list(what: str, names: list[str]) -> str:
    shown = ", ".join(names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what}{shown}{more}" if names else ""


def _need(loader: str, origin: str, state: State, key: str, ndim: int) -> Tensor:
    if key not in state:
        raise ValueError(f"{loader}: {origin} does not fit FusedViT: missing {key}")
    if state[key].ndim != ndim:
        raise ValueError(
            f"{loader}: {origin} does not fit FusedViT: {key} has {state[key].ndim} dimensions,"
            f" {ndim} are expected"
        )
    return state[key]
