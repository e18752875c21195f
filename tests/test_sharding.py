"""The raw operators and the public functions on DTensors: two gloo processes give one's numbers."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from every_op import OPS, RawCalls, small_problem
from problems import output_gradients

from vitkernels import FusedViT, _sharding, ops
from vitkernels.testing import as_tuple, grads_of

RANKS = 2
LIMIT = 1e-6  # norm-relative
pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="this torch has no torch.distributed"
)


def in_processes(worker, tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path / "store"),), nprocs=RANKS)


def joined(rank: int, store: str):
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    return init_device_mesh("cpu", (RANKS,))


def left() -> None:
    """Ends the process here: a thread of gloo's may outlive Python's end and take it down."""
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def check_same(got, expected, what: str) -> None:
    assert (got is None) == (expected is None), what
    if expected is None:
        return
    got = whole(got)
    assert got.shape == expected.shape and got.dtype == expected.dtype, what
    error = (got - expected).norm() / expected.norm().clamp(min=1e-3)
    assert error < LIMIT, f"{what}: {error:.3g}"


def raw_calls(op: str) -> list:
    problem = small_problem(op, batch=3)
    with RawCalls() as recorded:
        incoming = output_gradients(problem, as_tuple(problem.ours()(*problem.inputs.values())))
        recorded.calls.clear()
        grads_of(problem.ours(), problem.inputs.values(), incoming)
    return recorded.calls


# --- raw operators --------------------------------------------------------------------------------


def test_every_overload_has_a_rule():
    from torch._library.simple_registry import singleton as rules
    from torch.distributed.tensor import DTensor

    names = {name for name in torch._C._dispatch_get_all_op_names() if "vitkernels::" in name}
    assert len(names) >= 5 * 2 * 8
    for name in names:
        packet, _, _ = name.removeprefix("vitkernels::").partition(".")
        assert rules.find(name).torch_dispatch_rules.find(DTensor) is not None, name
        assert callable(_sharding.rule_of(packet))


def each_split(rank: int, store: str) -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh, splits = joined(rank, store), {}
    for op in OPS:
        for overload, args, results in raw_calls(op):
            name, schema = overload._schema.name.removeprefix("vitkernels::"), overload._schema
            arguments = [argument.name for argument in schema.arguments]
            ways = _sharding.rule_of(name)(**dict(zip(arguments, args, strict=True)))
            splits[name] = len(ways)
            for backend in ("default", "reference"):
                call = getattr(getattr(torch.ops.vitkernels, name), backend)
                for outputs, inputs in ({}, {}), *ways:
                    what = f"{name}.{backend} {inputs}"
                    placed = [
                        distribute_tensor(
                            a.detach(), mesh, [Shard(inputs[n]) if n in inputs else Replicate()]
                        )
                        if isinstance(a, torch.Tensor)
                        else a
                        for n, a in zip(arguments, args, strict=True)
                    ]
                    with CommDebugMode() as communication:
                        got = call(*placed)
                    # What is split as the rule says stays where it is.
                    assert communication.get_total_counts() == 0, what
                    pairs = zip(as_tuple(got), as_tuple(results), strict=True)
                    for entry, (mine, other) in zip(schema.returns, pairs, strict=True):
                        check_same(mine, other, f"{what}: {entry.name}")
                        if mine is not None:
                            where = outputs.get(entry.name)
                            split = Partial() if where == "sum" else Replicate()
                            split = Shard(where) if isinstance(where, int) else split
                            assert mine.placements == (split,), f"{what}: {entry.name}"
    assert all(n > 0 for name, n in splits.items() if name != "distillation_loss_fwd"), splits
    assert splits["attention_fwd"] == 3 and splits["linear_gelu_bwd"] == 3
    left()


def test_each_split_of_each_raw_operator(tmp_path):
    in_processes(each_split, tmp_path)


# --- public functions -----------------------------------------------------------------------------


def public_functions(rank: int, store: str) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, batch = joined(rank, store), 4

    def placed(problem, place):
        def moved(values):
            return {
                n: distribute_tensor(v, mesh, [place(v)]) if isinstance(v, torch.Tensor) else v
                for n, v in values.items()
            }

        return dataclasses.replace(
            problem, inputs=moved(problem.inputs), options=moved(problem.options)
        )

    def by_samples(tensor):
        return Shard(0) if tensor.ndim and tensor.shape[0] == batch else Replicate()

    def badly(tensor):
        """Along the last dimension, which most operators reduce over."""
        last = tensor.ndim and tensor.shape[-1] >= RANKS
        return Shard(tensor.ndim - 1) if last else Replicate()

    for op in OPS:
        takes_dropout = op in ("add_layer_norm", "attention", "window_attention")
        for dropout_p in (0.0, 0.3) if takes_dropout else (0.0,):
            more = {"dropout_p": dropout_p} if takes_dropout else {}
            problem = small_problem(op, batch=batch, **more)
            incoming = output_gradients(problem, as_tuple(problem.ours()(*problem.inputs.values())))
            expected = grads_of(problem.ours(), problem.inputs.values(), incoming)
            incoming = [distribute_tensor(g, mesh, [Replicate()]) for g in incoming]
            for place in (by_samples, badly):
                spread = placed(problem, place)
                got = grads_of(spread.ours(), spread.inputs.values(), incoming)
                what = f"{op} dropout {dropout_p} {place.__name__}"
                for i, (mine, other) in enumerate(zip(got[0], expected[0], strict=True)):
                    check_same(mine.detach(), other.detach(), f"{what}: output {i}")
                for name, mine, other in zip(problem.inputs, got[1], expected[1], strict=True):
                    check_same(mine, other, f"{what}: gradient of {name}")
    left()


def test_public_functions_on_dtensors(tmp_path):
    in_processes(public_functions, tmp_path)


def model(rank: int, store: str) -> None:
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    mesh = joined(rank, store)
    torch.manual_seed(0)
    ours = FusedViT(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10,
        init_values=0.3, reg_tokens=2, drop_path_rate=0.3,
    ).eval()  # fmt: skip
    x = torch.randn(4, 3, 32, 32)
    logits = ours(x)
    logits.square().mean().backward()
    expected = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    spread = distribute_module(ours, mesh)
    part = distribute_tensor(x, mesh, [Shard(0)])
    for call in (spread, torch.compile(spread, backend="aot_eager", fullgraph=True)):
        spread.zero_grad()
        got = call(part)
        assert got.placements == (Shard(0),)
        check_same(got.detach(), logits.detach(), "logits")
        got.square().mean().backward()
        for name, parameter in spread.named_parameters():
            check_same(parameter.grad, expected[name], name)
    spread.train()(part).square().mean().backward()  # DropPath's factors are plain Tensors
    left()


def test_a_model_of_dtensors(tmp_path):
    """Batches split, parameters on both processes: every operator keeps the split."""
    in_processes(model, tmp_path)


def meshes(rank: int, store: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    line = joined(rank, store)
    plane = init_device_mesh("cpu", (1, RANKS))
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 5, 4, 8) for _ in range(3))
    expected = ops.attention(q, k, v)
    parts = [distribute_tensor(t, plane, [Shard(0), Shard(2)]) for t in (q, k, v)]
    out = ops.attention(*parts)
    assert out.placements == (Shard(0), Shard(2))
    check_same(out, expected, "samples along one dimension of the mesh, heads along the other")
    parts[2] = v
    check_same(ops.attention(*parts), expected, "a plain Tensor is on every process")
    parts[2] = distribute_tensor(v, line, [Replicate()])
    with pytest.raises(ValueError, match=r"attention_fwd: v must be on DeviceMesh.* as the others"):
        ops.attention(*parts)
    left()


def test_meshes(tmp_path):
    in_processes(meshes, tmp_path)


# --- when the rules arrive ------------------------------------------------------------------------

COUNT = """
from torch.distributed.tensor import DTensor
from torch._library.simple_registry import singleton as rules
names = [name for name in torch._C._dispatch_get_all_op_names() if "vitkernels::" in name]
known = [name for name in names if rules.find(name).torch_dispatch_rules.find(DTensor) is not None]
print(len(known), torch.distributed.tensor.__loader__)
"""


@pytest.mark.parametrize("first", ["vitkernels", "torch.distributed.tensor"])
def test_imports_in_either_order(first):
    other = {"vitkernels": "torch.distributed.tensor"}.get(first, "vitkernels")
    code = f"import torch\nimport {first}\nimport {other}\n{COUNT}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, loader = done.stdout.split(maxsplit=1)
    assert int(count) >= 5 * 2 * 8 and "SourceFileLoader" in loader


def test_nothing_is_imported_before_it_is_needed():
    code = """
import sys, torch, vitkernels
assert "torch.distributed.tensor" not in sys.modules
x = torch.randn(2, 3, 8, requires_grad=True)
vitkernels.ops.add_layer_norm(x, x, None, None, dropout_p=0.5)[0].sum().backward()
assert "torch.distributed.tensor" not in sys.modules
assert not [name for name in sys.modules if name.endswith("._sharding") and ".ops." in name]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
