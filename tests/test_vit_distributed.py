"""FusedViT under DDP, FSDP2 and tensor parallelism on two gloo processes: one's gradients."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from vitkernels import FusedViT

RANKS = 2
WAYS = ("ddp", "fsdp_blocks", "fsdp_blocks_checkpointing", "fsdp_whole", "tensor_parallel")


def distributed(model: FusedViT, way: str) -> torch.nn.Module:
    if way == "ddp":
        return DistributedDataParallel(model)
    if way == "tensor_parallel":  # the MLPs: their Linears' weights become DTensors
        plan = {}
        for i in range(len(model.blocks)):
            plan[f"blocks.{i}.mlp.fc1"] = ColwiseParallel()
            plan[f"blocks.{i}.mlp.fc2"] = RowwiseParallel()
        return parallelize_module(model, init_device_mesh("cpu", (RANKS,)), plan)
    if way.startswith("fsdp_blocks"):
        for block in model.blocks:
            fully_shard(block, reshard_after_forward=True)
        model.set_grad_checkpointing(way.endswith("checkpointing"))
    return fully_shard(model)


def worker(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    model = FusedViT(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=10,
        init_values=0.3, reg_tokens=2,
    )  # fmt: skip
    x = torch.randn(2 * RANKS, 3, 32, 32)
    alone = copy.deepcopy(model)
    alone(x).square().mean().backward()
    for way in WAYS:
        sharded = distributed(copy.deepcopy(model), way)
        part = x if way == "tensor_parallel" else x[2 * rank : 2 * rank + 2]
        sharded(part).square().mean().backward()
        for (name, got), expected in zip(
            sharded.named_parameters(), alone.parameters(), strict=True
        ):
            grad = got.grad.full_tensor() if hasattr(got.grad, "full_tensor") else got.grad
            error = (grad - expected.grad).norm() / (expected.grad.norm() + 1e-6)
            assert error < 1e-6, f"{way}, {name}: {error:.2g}"
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_gradients_equal_one_process(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path / "store"),), nprocs=RANKS)
