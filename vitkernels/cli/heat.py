"""What attention-map draws: heat for each token of a map, of every picture."""

from __future__ import annotations

import argparse
import dataclasses

import torch
from torch import Tensor, nn

from .usage import UsageError


@dataclasses.dataclass
class Panel:
    """One picture over the whole image."""

    title: str
    heat: Tensor  # (rows, columns) of tokens; NaN: cannot be attended to
    windows: Tensor | None = None  # (rows, columns): the number of the window that holds a token
    query: tuple[int, int] | None = None  # row and column of the token that looks


def panels_of(model: nn.Module, x: Tensor, options: argparse.Namespace) -> list[Panel]:
    """Of one image, x (1, channels, height, width), as the arguments ask."""
    return _of_swin(model, x, options) if hasattr(model, "layers") else _of_vit(model, x, options)


def check_numbers(model: nn.Module, options: argparse.Namespace) -> None:
    """Refuse blocks, stages and heads that the model does not have."""
    blocks, stages = _blocks(model), len(getattr(model, "layers", ()))
    if options.stage is not None and not stages:
        raise UsageError("--stage: a ViT has no stages: name a --block")
    if stages and options.rollout:
        raise UsageError("--rollout: the windows of a Swin have no rollout: leave it out")
    for argument, value, number in (
        ("block", options.block, len(blocks)),
        ("stage", options.stage, stages),
    ):
        if value is not None and not -number <= value < number:
            known = f"the model has the {argument}s 0 to {number - 1}"
            raise UsageError(f"--{argument}: {known}, got {value}")
    heads = min(blocks[i].attn.num_heads for i in _chosen(model, options))
    if isinstance(options.head, int) and options.head >= heads:
        who = f"block {_chosen(model, options)[0]}" if stages else "the model"
        raise UsageError(f"--head: {who} has the heads 0 to {heads - 1}, got {options.head}")


def _blocks(model: nn.Module) -> list[nn.Module]:
    if hasattr(model, "layers"):
        return [block for stage in model.layers for block in stage.blocks]
    return list(model.blocks)


def _chosen(model: nn.Module, options: argparse.Namespace) -> list[int]:
    """The blocks to draw; of one of them only where every head is drawn."""
    numbers = list(range(len(_blocks(model))))
    if options.block is not None:
        return [numbers[options.block]]
    if options.stage is not None:
        stage = options.stage % len(model.layers)
        before = sum(len(layer.blocks) for layer in model.layers[:stage])
        numbers = numbers[before : before + len(model.layers[stage].blocks)]
    return numbers[-1:] if options.head == "all" else numbers


def _token_at(query: tuple[float, float], size: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the token under a point, given as shares of width and height."""
    (x, y), (H, W) = query, size
    return min(int(y * H), H - 1), min(int(x * W), W - 1)


# --- ViT ------------------------------------------------------------------------------------------


@torch.no_grad()
def _of_vit(model: nn.Module, x: Tensor, options: argparse.Namespace) -> list[Panel]:
    from ..models import attention_rollout

    grid = model.patch_embed.dynamic_feat_size(tuple(x.shape[-2:]))
    P = model.num_prefix_tokens
    query = None if options.query is None else _token_at(options.query, grid)
    row = 0 if model.has_class_token else None
    if query is not None:
        row = P + query[0] * grid[1] + query[1]

    def panel(title: str, rows: Tensor) -> Panel:
        """Of (queries, N): the row of one query, or the mean over the patches' rows."""
        heat = rows[0] if row is not None else rows.mean(0)
        return Panel(title, heat[P:].float().cpu().reshape(grid), query=query)

    if options.rollout:
        full = attention_rollout(model.attention_maps(x))[0]
        return [panel("rollout through all blocks", full if row is None else full[row : row + 1])]
    maps = model.attention_maps(x, None if row is None else [row])
    chosen = _chosen(model, options)
    if options.head == "all":
        (i,) = chosen
        return [panel(f"block {i}, head {h}", rows) for h, rows in enumerate(maps[i][0])]
    if options.head == "mean":
        return [panel(f"block {i}", maps[i][0].mean(0)) for i in chosen]
    return [panel(f"block {i}, head {options.head}", maps[i][0, options.head]) for i in chosen]


# --- Swin -----------------------------------------------------------------------------------------


@torch.no_grad()
def _of_swin(model: nn.Module, x: Tensor, options: argparse.Namespace) -> list[Panel]:
    maps = model.attention_maps(x)
    stages = [stage for stage, layer in enumerate(model.layers) for _ in layer.blocks]
    panels = []
    for i in _chosen(model, options):
        shifted = ", shifted" if any(maps[i].shift) else ""
        title = f"block {i} (stage {stages[i]}{shifted})"
        of_heads = maps[i].weights[0].transpose(0, 1).float()  # (heads, windows, N, N)
        if options.head == "mean":
            panels.append(_stitched(title, maps[i], of_heads.mean(0), options.query))
        elif options.head == "all":
            for h, weights in enumerate(of_heads):
                titled = f"block {i}, head {h}{shifted}"
                panels.append(_stitched(titled, maps[i], weights, options.query))
        else:
            titled = f"block {i}, head {options.head}{shifted}"
            panels.append(_stitched(titled, maps[i], of_heads[options.head], options.query))
    return panels


def _stitched(title: str, of_block, weights: Tensor, query) -> Panel:
    """Windows (windows, N, N), each at its place in the map: what a token receives from the tokens
    of its window on average, or from the one that asks, in multiples of an equal share."""
    H, W = of_block.size
    tokens = of_block.tokens.to(weights.device)
    real = tokens >= 0  # the others are padding
    looking = real
    if query is not None:
        query = _token_at(query, (H, W))
        looking = tokens == query[0] * W + query[1]
    sees = weights > 0  # not over the seams of a shifted map
    queries = (sees & looking[:, :, None]).sum(1)  # of each key; none: 0 / 0 is NaN
    values = (weights * looking[:, :, None]).sum(1) / queries * sees.sum(1)
    numbers = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens)
    heat, windows = values.new_zeros(H * W), numbers.new_zeros(H * W)
    heat[tokens[real]], windows[tokens[real]] = values[real], numbers[real]
    return Panel(title, heat.reshape(H, W).cpu(), windows.reshape(H, W).cpu(), query)
