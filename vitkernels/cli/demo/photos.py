"""Models on photographs: fused, stock PyTorch and timm, in fp32 and bf16, timed side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ... import use_backend
from .. import naming

SIZE = 224
CROPS_EACH = 4


@dataclasses.dataclass
class Row:
    """One line of the table."""

    model: str
    dtype: str
    contender: str
    backend: str
    milliseconds: float  # best of the rounds, one batch
    images_per_second: float
    peak_mib: float
    max_difference: float  # of the logits, against float64
    relative_difference: float  # the same over the largest logit
    rounds: int


def load_photographs() -> dict[str, Tensor]:
    """The two photographs that scikit-learn bundles, (3, H, W) in [0, 1]."""
    data = load_sample_images()
    return {
        name: torch.from_numpy(image.copy()).permute(2, 0, 1) / 255
        for name, image in zip(("china", "flower"), data.images, strict=True)
    }


def square(photo: Tensor, where: float = 0.5) -> Tensor:
    """The largest square, at `where` (0 left, 1 right) along the longer side, resized to 224."""
    side = min(photo.shape[-2:])
    top, left = (int((s - side) * where) for s in photo.shape[-2:])
    crop = photo[None, :, top : top + side, left : left + side]
    return F.interpolate(crop, size=(SIZE, SIZE), mode="bilinear", antialias=True)[0].clamp(0, 1)


def make_batch(photos: dict[str, Tensor], device: torch.device) -> Tensor:
    """Eight views of the photographs, in [0, 1]: left, middle, right, and the middle at full
    resolution."""
    views = []
    for photo in photos.values():
        views += [square(photo, where) for where in (0.0, 0.5, 1.0)]
        top, left = ((s - SIZE) // 2 for s in photo.shape[-2:])
        views.append(photo[:, top : top + SIZE, left : left + SIZE])
    return torch.stack(views).to(device)


def normalised(images: Tensor, model: nn.Module) -> Tensor:
    """As this model wants it."""
    mean, std = (t.view(-1, 1, 1) for t in (model.patch_embed.mean, model.patch_embed.std))
    return (images - mean) / std


def make_model(name: str, seed: int, device: torch.device) -> nn.Module:
    torch.manual_seed(seed)
    return naming.make_model(name).to(device)


def make_timm_twin(name: str, model: nn.Module) -> tuple[nn.Module | None, str]:
    """timm's model with the same weights, or None and why not."""
    try:
        import timm
    except Exception as error:  # beside a CPU-only torch, torchvision raises RuntimeError
        return None, f"timm does not import here: {str(error).splitlines()[0]}"
    twin = timm.create_model(name).eval().to(next(model.parameters()))
    twin.load_state_dict(model.to_timm_state_dict(), strict=True)
    return twin, timm.__version__


def measure(
    name: str, images: Tensor, backend: str, seed: int, rounds: int, budget_s: float, step: Callable
) -> tuple[list[Row], str]:
    """Rows for fp32 and bf16; `step(text)` is called 2 * (rounds + 2) times at most."""
    rows, note = [], ""
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(name, seed, images.device)
        x = normalised(images, model).to(dtype)
        model.to(dtype)
        step("float64 truth")
        truth = float64_logits(name, model, x, seed)
        contenders: dict[str, tuple[str, nn.Module]] = {
            "fused": (backend, model),
            "stock PyTorch": ("torch", model),
        }
        twin, note = make_timm_twin(name, model)
        if twin is not None:
            contenders["timm"] = ("auto", twin)
        rows += _race(name, contenders, x, truth, rounds, budget_s, step)
    return rows, note


def float64_logits(name: str, model: nn.Module, x: Tensor, seed: int) -> Tensor:
    exact = make_model(name, seed, torch.device("cpu")).double().to(x.device)
    exact.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
    with torch.inference_mode(), use_backend("reference"):
        return exact(x.double())


def _race(
    name: str, contenders, x: Tensor, truth: Tensor, rounds: int, budget_s: float, step: Callable
) -> list[Row]:
    """Alternating rounds, so that a busy machine is unfair to all alike; the best time counts."""
    best = dict.fromkeys(contenders, float("inf"))
    logits, peaks = {}, {}
    for label, (backend, model) in contenders.items():
        with _running(backend):
            logits[label] = model(x)  # also the warm-up
            peaks[label] = peak_bytes(lambda model=model: model(x), x.device)
    step(_short(x.dtype))
    start, done = time.perf_counter(), 0
    while done < rounds and (done == 0 or time.perf_counter() - start < budget_s):
        done += 1
        for label, (backend, model) in contenders.items():
            with _running(backend):
                best[label] = min(best[label], seconds(lambda model=model: model(x), x.device))
        step(f"{_short(x.dtype)}, " + ", ".join(f"{k} {len(x) / s:.1f}/s" for k, s in best.items()))
    rows = []
    for label, (backend, _) in contenders.items():
        difference = (logits[label].double() - truth).abs().max().item()
        rows.append(
            Row(
                model=name,
                dtype=_short(x.dtype),
                contender=label,
                backend="" if label == "timm" else backend,
                milliseconds=1e3 * best[label],
                images_per_second=len(x) / best[label],
                peak_mib=peaks[label] / 2**20,
                max_difference=difference,
                relative_difference=difference / truth.abs().max().item(),
                rounds=done,
            )
        )
    return rows


@contextlib.contextmanager
def _running(backend: str):
    with torch.inference_mode(), use_backend(backend):
        yield


def seconds(call: Callable, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_bytes(call: Callable, device: torch.device) -> int:
    """The most memory that torch's allocator held during the call beyond what it held before.

    GPU: torch.cuda.max_memory_allocated. CPU: the running sum of the allocator's own events, from
    the profiler; what a library takes by malloc (oneDNN's scratch) does not go through it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes to stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    held = peak = 0
    events = recorded.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
