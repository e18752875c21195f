"""The models under DDP, FSDP2 and tensor parallelism on two gloo processes: one's gradients."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from vitkernels import FusedDeiT, FusedHybridViT, FusedSwin, FusedViT

RANKS = 2
WAYS = ("ddp", "fsdp_blocks", "fsdp_blocks_checkpointing", "fsdp_whole", "tensor_parallel")


def blocks_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    kinds = ("Block", "SwinBlock", "SwinV2Block")
    return {name: m for name, m in model.named_modules() if type(m).__name__ in kinds}


def distributed(model: torch.nn.Module, way: str) -> torch.nn.Module:
    if way == "ddp":
        return DistributedDataParallel(model)
    if way == "tensor_parallel":  # the MLPs: their Linears' weights become DTensors
        plan = {}
        for name in blocks_of(model):
            plan[f"{name}.mlp.fc1"] = ColwiseParallel()
            plan[f"{name}.mlp.fc2"] = RowwiseParallel()
        return parallelize_module(model, init_device_mesh("cpu", (RANKS,)), plan)
    if way == "dtensors":
        return distribute_module(model, init_device_mesh("cpu", (RANKS,)))
    if way.startswith("fsdp_blocks"):
        for block in blocks_of(model).values():
            fully_shard(block, reshard_after_forward=True)
        model.set_grad_checkpointing(way.endswith("checkpointing"))
    return fully_shard(model)


def models():
    vit = {"embed_dim": 48, "depth": 3, "num_heads": 3, "init_values": 0.3, "reg_tokens": 2}
    swin = {"embed_dim": 24, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}
    yield FusedViT(img_size=32, patch_size=8, num_classes=10, **vit)
    yield FusedHybridViT((1,), 32, 2, num_classes=10, embed_dim=48, depth=2, num_heads=3)
    yield FusedDeiT(img_size=32, patch_size=8, num_classes=10, **{**vit, "reg_tokens": 0})
    for version in (1, 2):
        model = FusedSwin(img_size=32, patch_size=2, num_classes=10, version=version, **swin)
        yield model.eval()  # DropPath draws apart on each process


def worker(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    for model in models():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        x = torch.randn(2 * RANKS, 3, 32, 32)
        alone = copy.deepcopy(model)
        alone(x).square().mean().backward()
        swin = isinstance(model, FusedSwin)  # of FusedViT: test_sharding.py
        for way in (*WAYS, "dtensors") if swin else WAYS:
            check(model, way, x, rank, alone)
    dist.destroy_process_group()


def check(model: torch.nn.Module, way: str, x: torch.Tensor, rank: int, alone) -> None:
    sharded = distributed(copy.deepcopy(model), way)
    part = x if way == "tensor_parallel" else x[2 * rank : 2 * rank + 2]
    if way == "dtensors":
        part = distribute_tensor(x, init_device_mesh("cpu", (RANKS,)), [Shard(0)])
    sharded(part).square().mean().backward()
    # Gradients that nearly cancel (the MLP of V2's position biases) are judged by the others' size.
    floor = 1e-2 * max(p.grad.norm() for p in alone.parameters())
    for (name, got), expected in zip(sharded.named_parameters(), alone.parameters(), strict=True):
        grad = got.grad.full_tensor() if hasattr(got.grad, "full_tensor") else got.grad
        error = (grad - expected.grad).norm() / expected.grad.norm().clamp(min=floor)
        assert error < 1e-6, f"{type(model).__name__} {way}, {name}: {error:.2g}"


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_gradients_equal_one_process(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path / "store"),), nprocs=RANKS)
