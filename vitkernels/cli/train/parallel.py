"""One run on several processes of torchrun: replicas (DDP), sharded parameters (FSDP2), or split
heads and hidden units (tensor parallelism, see heads.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...nn.watched import own_part

BLOCKS = ("Block", "ResPostBlock", "SwinBlock", "SwinV2Block", "EncoderBlock")


@dataclasses.dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1
    local: int = 0  # the GPU of this machine

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool, device: torch.device) -> bool:
        return (
            flag if self.size == 1 else bool(self.total(torch.tensor(float(flag), device=device)))
        )

    def gather(self, value) -> list:
        if self.size == 1:
            return [value]
        found = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def data(self, parallel: str) -> tuple[int, int]:
        """(rank, world) of the batches: under tensor parallelism all processes see the same."""
        return (0, 1) if parallel == "tp" else (self.rank, self.size)


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """The processes that torchrun started, or this one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(rank, size, local)
    finally:
        dist.destroy_process_group()


def spread(model: nn.Module, kind: str, world: World, device: torch.device) -> nn.Module:
    """What to call instead of the model, whose parameters are then this process's."""
    if world.size == 1:
        return model
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(
            model, device_ids=[world.local] if device.type == "cuda" else None
        )
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for module in model.modules():
            if type(module).__name__ in BLOCKS:
                fully_shard(module)
        return fully_shard(model)
    from .heads import split_heads

    return split_heads(model, world.size, device)


def give_back(model: nn.Module) -> None:
    """After a forward without a backward: what FSDP gathered for it goes back into shards."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


# --- gradients ------------------------------------------------------------------------------------


def clip_gradients(parameters, most: float) -> Tensor:
    """As torch's clip_grad_norm_, of plain and sharded gradients together; the norm before."""
    from torch.distributed.tensor import DTensor

    parts = {True: [], False: []}  # sharded: the squares of the processes add up
    locals_ = []
    for p in parameters:
        if p.grad is None:
            continue
        sharded = isinstance(p.grad, DTensor) and any(s.is_shard() for s in p.grad.placements)
        local = own_part(p.grad)
        locals_.append(local)
        parts[sharded].append(local.detach().float().square().sum())
    if not locals_:
        return torch.zeros(())
    zero = torch.zeros((), device=locals_[0].device)
    split = torch.stack(parts[True]).sum() if parts[True] else zero
    if parts[True]:
        dist.all_reduce(split)
    norm = (split + (torch.stack(parts[False]).sum() if parts[False] else zero)).sqrt()
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    for local in locals_:
        local.mul_(factor.to(local.dtype))
    return norm


class Scaler(torch.amp.GradScaler):
    """Also for gradients of which some are split over the processes and some are not: torch's takes
    no mixture, and all processes must skip the same steps."""

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        grads = (p.grad for group in optimizer.param_groups for p in group["params"])
        mine = (own_part(grad) for grad in grads if grad is not None)
        parts = SimpleNamespace(param_groups=[{"params": [_with_grad(g) for g in mine]}])
        found = super()._unscale_grads_(parts, inv_scale, found_inf, allow_fp16)
        for value in found.values():
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return found


def _with_grad(grad: Tensor) -> Tensor:
    holder = grad.detach()
    holder.grad = grad
    return holder
