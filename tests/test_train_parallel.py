"""`vitkernels train` on two gloo processes: one process's losses and weights, one form on disk."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from vitkernels.cli.train import train
from vitkernels.cli.train.options import Options
from vitkernels.cli.train.parallel import Scaler, World, joined
from vitkernels.cli.usage import UsageError

RANKS = 2
KINDS = ("ddp", "fsdp", "tp")
SWIN = {"patch_size": 2, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4), "window_size": 2}
VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "qkv_bias": False}
SPLIT = {  # the other families whose heads are split
    "swin": ("swin_tiny_patch4_window7_224", {**SWIN, "head_dim": 4, "qkv_bias": False}),
    "swinv2": ("swinv2_tiny_window8_256", SWIN),
    "hybrid": ("vit_tiny_r_s16_p8_224", {**VIT, "patch_size": 1}),
}
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="this torch has no torch.distributed"
)


def options(out, kind="ddp", world=1, **more) -> Options:
    """The same images in every step, however many processes share them."""
    batch = 128 // (1 if kind == "tp" else world)
    settings = {
        "data": "digits", "model": "vit_tiny_patch4_8", "model_kwargs": VIT, "out": str(out),
        "batch": batch, "epochs": 2, "warmup_epochs": 0.0, "workers": 0, "parallel": kind,
        "ema": 0.9, "clip_grad": 0.5,
    }  # fmt: skip
    return Options(**{**settings, **more})


def of_family(family: str, out, kind: str = "ddp", world: int = 1) -> Options:
    """With DropPath, which must draw the same on each process; small steps, since Adam blows up the
    rounding of small gradients."""
    name, sizes = SPLIT[family]
    more = {"model": name, "model_kwargs": sizes, "drop_path": 0.2}
    return options(out, kind, world, **more, batch=256, lr=3e-4)


def go(o: Options, world: World, resuming: bool = False) -> None:
    if world.first and not resuming:
        os.makedirs(o.out)
    if world.size > 1:
        dist.barrier()
    train(o, world, CPU, Console(file=io.StringIO()), resuming)


def worker(rank: int, root: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "localhost",
                   "MASTER_PORT": str(port)}  # fmt: skip
    with joined(CPU) as world:
        for kind in KINDS:
            go(options(f"{root}/{kind}", kind, RANKS), world)
            go(options(f"{root}/from-one-{kind}", kind, RANKS), world, resuming=True)
        for family in SPLIT:
            go(of_family(family, f"{root}/{family}-tp", "tp", RANKS), world)
            go(of_family(family, f"{root}/{family}-from-one", "tp", RANKS), world, resuming=True)
        check_scaler(rank)
        more = {"model_kwargs": {"embed_dim": 18, "depth": 1, "num_heads": 3}}
        with pytest.raises(UsageError, match="3 heads, which 2 processes cannot"):
            go(options(f"{root}/odd", "tp", RANKS, **more), world)
        with pytest.raises(UsageError, match="--compile: not with --parallel tp"):
            go(options(f"{root}/compiled", "tp", RANKS, compile=True), world)
        more = {"model": SPLIT["swin"][0], "model_kwargs": {**SWIN, "num_heads": (2, 1)}}
        with pytest.raises(UsageError, match=r"layers\.1\.blocks\.0 has 1 heads, which 2"):
            go(options(f"{root}/odd-swin", "tp", RANKS, **more), world)


def check_scaler(rank: int) -> None:
    """An infinity in one process's part: all skip the step, and none the next."""
    mesh = init_device_mesh("cpu", (RANKS,))
    split = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    whole = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([split, whole], lr=0.5)
    scaler = Scaler("cpu", init_scale=4.0)
    for worst, expected in ((torch.inf, 1.0), (1.0, 0.5)):
        factors = distribute_tensor(torch.tensor([worst, 1.0, 1.0, 1.0]), mesh, [Shard(0)])
        loss = (split * factors).to_local().sum() + whole.sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(split.full_tensor(), torch.full((4,), expected)), rank
        assert torch.equal(whole, torch.full((2,), expected)), rank


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process's run; two processes' of each kind, from the start and after its first epoch."""
    root = tmp_path_factory.mktemp("parallel")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    go(options(root / "one"), World())
    for kind in KINDS:
        halt_after_one_epoch(root / "one", root / f"from-one-{kind}")
    for family in SPLIT:
        go(of_family(family, root / f"{family}-one"), World())
        halt_after_one_epoch(root / f"{family}-one", root / f"{family}-from-one")
    port = 20_000 + os.getpid() % 20_000
    torch.multiprocessing.spawn(worker, (str(root), port), nprocs=RANKS)
    for kind in KINDS:
        halt_after_one_epoch(root / kind, root / f"one-from-{kind}")
        go(options(root / f"one-from-{kind}"), World(), resuming=True)
    for family in SPLIT:
        halt_after_one_epoch(root / f"{family}-tp", root / f"{family}-from-tp")
        go(of_family(family, root / f"{family}-from-tp"), World(), resuming=True)
    torch.set_num_threads(before)
    return root


def halt_after_one_epoch(source, target) -> None:
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints" / "epoch-0002")
    (target / "last.json").write_text(json.dumps({"checkpoint": "checkpoints/epoch-0001"}))


def check_equal(root, name: str, one: str = "one") -> None:
    """Losses, weights and the optimiser's moments. (Without a bias of k, whose gradient is nothing
    but rounding, which Adam blows up.)"""
    rows, mine = (json.loads((root / n / "log.json").read_text()) for n in (one, name))
    for row, other in zip(rows, mine, strict=True):
        assert other["train_loss"] == pytest.approx(row["train_loss"], rel=1e-6)
        assert other["val_loss"] == pytest.approx(row["val_loss"], rel=1e-6)
        assert other["val_accuracy"] == row["val_accuracy"]
    for kind, allowed in (("weights", 1e-6), ("exp_avg", 1e-5), ("exp_avg_sq", 1e-5)):
        truth, found = everything(root / one, kind), everything(root / name, kind)
        assert truth.keys() == found.keys()
        largest = max(value.norm() for value in truth.values())
        for key, value in truth.items():
            error = (found[key] - value).norm() / value.norm().clamp(min=1e-2 * largest)
            assert error < allowed, f"{kind} {key}: {error:.2g}"


def everything(run, kind: str) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / "epoch-0002"
    if kind == "weights":
        return load_file(folder / "model.safetensors")
    state = torch.load(folder / "state.pt", weights_only=True)
    return {name: moments[kind] for name, moments in state["moments"].items()}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(runs, kind):
    check_equal(runs, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_one_process_goes_on_with_two(runs, kind):
    check_equal(runs, f"from-one-{kind}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_two_processes_goes_on_with_one(runs, kind):
    check_equal(runs, f"one-from-{kind}")


@pytest.mark.parametrize("family", SPLIT)
@pytest.mark.parametrize("run", ["tp", "from-one", "from-tp"])
def test_the_heads_of_every_family_are_split(runs, family, run):
    check_equal(runs, f"{family}-{run}", f"{family}-one")


def test_torchrun(tmp_path):
    """The command of the README; the log is one process's, not two."""
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "vitkernels",
        "train", "--data", "digits", "--epochs", "1", "--warmup-epochs", "0", "--batch", "256",
        "--workers", "0", "--out", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/1") == 1 and "2 processes (ddp)" in done.stdout
    assert len(json.loads((out / "log.json").read_text())) == 1
