"""Tensor parallelism: a process computes heads / processes heads of every attention, and as large a
part of every MLP's hidden units.

The packed rows of qkv are [all q | all k | all v]; sharding them in equal parts must give each
process its heads of all three, so they are permuted to [q k v of process 0 | q k v of process 1 |
...] when the model is split, and permuted back in what is saved. What else belongs to single heads
(Swin's tables of position biases, V2's logit_scale and biases of q and v) is sharded as it lies.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from ..usage import UsageError
from .parallel import BLOCKS

# Parameters beside qkv and proj that belong to heads, and along which dimension.
OF_HEADS = {
    "Attention": {},
    "WindowAttention": {"relative_position_bias_table": 1},
    "WindowAttentionV2": {"logit_scale": 0, "q_bias": 0, "v_bias": 0},
}


def split_heads(model: nn.Module, size: int, device: torch.device) -> nn.Module:
    mesh = init_device_mesh(device.type, (size,))
    blocks = {name: m for name, m in model.named_modules() if type(m).__name__ in BLOCKS}
    for name, block in blocks.items():
        _check(model, name, block, size)
    plan = {}
    for name, block in blocks.items():
        _split(block.attn, mesh, size)
        plan |= {
            f"{name}.attn.qkv": ColwiseParallel(),
            f"{name}.attn.proj": RowwiseParallel(),
            f"{name}.mlp.fc1": ColwiseParallel(),
            f"{name}.mlp.fc2": RowwiseParallel(),
        }
        if hasattr(block.attn, "cpb_mlp"):  # its last layer has an output for each head
            plan[f"{name}.attn.cpb_mlp.2"] = ColwiseParallel()
    return parallelize_module(model, mesh, plan)


@torch.no_grad()
def _split(attn: nn.Module, mesh, size: int) -> None:
    """All but the Linears, which parallelize_module splits."""
    head_dim = attn.qkv.out_features // (3 * attn.num_heads)
    order = packed_order(attn.num_heads, head_dim, size)
    for parameter in attn.qkv.parameters():
        parameter.copy_(parameter[order.to(parameter.device)])
    for name, dim in OF_HEADS[type(attn).__name__].items():
        whole = getattr(attn, name)
        if whole is not None:
            mine = distribute_tensor(whole.detach(), mesh, [Shard(dim)], src_data_rank=None)
            setattr(attn, name, nn.Parameter(mine, whole.requires_grad))
    attn.num_heads //= size


def _check(model: nn.Module, name: str, block: nn.Module, size: int) -> None:
    attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    if type(attn).__name__ not in OF_HEADS or type(mlp).__name__ != "Mlp":
        raise UsageError(
            f"--parallel tp: {type(model).__name__} has a {type(block).__name__} that cannot "
            "be split by heads: use ddp or fsdp"
        )
    if attn.num_heads % size:
        raise UsageError(
            f"--parallel tp: {name} has {attn.num_heads} heads, which {size} processes cannot "
            "share evenly: use a number of processes that divides them, or ddp or fsdp"
        )
    if mlp.fc1.out_features % size:
        raise UsageError(
            f"--parallel tp: {name} has {mlp.fc1.out_features} hidden units, which {size} "
            "processes cannot share evenly: use ddp or fsdp"
        )
    norms = (getattr(attn, "norm", None), getattr(mlp, "norm", None))
    if not all(norm is None or isinstance(norm, nn.Identity) for norm in norms):
        raise UsageError(
            f"--parallel tp: {name} normalises across heads (scale_norm): use ddp or fsdp"
        )


# --- the order of packed rows ---------------------------------------------------------------------


def packed_order(heads: int, head_dim: int, size: int) -> Tensor:
    """Rows of a packed qkv in the order of processes."""
    rows = torch.arange(3 * heads * head_dim).view(3, size, heads // size * head_dim)
    return rows.transpose(0, 1).reshape(-1)


def unpacked(name: str, value: Tensor, heads: int, size: int) -> Tensor:
    """A full parameter, or its moment, in the order of checkpoints."""
    if ".attn.qkv." not in name or value.ndim == 0:
        return value
    order = packed_order(heads, len(value) // (3 * heads), size)
    out = torch.empty_like(value)
    out[order] = value
    return out


def packed(name: str, value: Tensor, heads: int, size: int) -> Tensor:
    if ".attn.qkv." not in name or value.ndim == 0:
        return value
    return value[packed_order(heads, len(value) // (3 * heads), size)]
