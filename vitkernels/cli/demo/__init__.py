"""`vitkernels demo`: train, check and time a Vision Transformer on real images; write a report."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import platform
import time

import torch

from ... import _native, use_backend
from ..._version import __version__
from .. import UsageError

NEEDS = {  # module: package
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "rich": "rich",
    "numpy": "numpy",
}
ACCURACY = 0.97


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much work; `--quick` is for trying it out and for tests."""

    epochs: int = 48
    peak_lr: float = 3e-3
    agreement_steps: int = 50
    model: str = "vit_small_patch16_224"
    batch: int = 8
    rounds: int = 20
    budget_s: float = 9.0  # for each dtype


FULL = Plan()
QUICK = Plan(epochs=3, agreement_steps=10, model="vit_tiny_patch16_224", batch=2, rounds=2)


def run(options: argparse.Namespace) -> int:
    missing = [package for module, package in NEEDS.items() if not _installed(module)]
    if missing:
        raise UsageError(
            f"demo needs {', '.join(missing)}: pip install 'vitkernels[demo]' or pip install "
            + " ".join(missing)
        )
    from .report import check_folder

    device = _device(options.device)
    if options.backend != "auto" and _native.missing[options.backend] is not None:
        raise UsageError(f"--backend {options.backend}: {_native.missing[options.backend]}")
    out = options.out.resolve()
    check_folder(out)
    threads = torch.get_num_threads()
    try:
        return _run(options, device, out)
    finally:
        torch.set_num_threads(threads)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no NVIDIA GPU is visible to torch: use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _run(options: argparse.Namespace, device: torch.device, out) -> int:
    from rich.console import Console
    from rich.table import Table

    from ..info import cpu_name, taken_backend
    from . import photos, pictures, report
    from .agreement import compare
    from .digits import Digits, make_model, train
    from .progress import bar

    start = time.perf_counter()
    plan = QUICK if options.quick else FULL
    console = Console(highlight=False, soft_wrap=True)
    backend = (
        taken_backend("add_layer_norm", device) if options.backend == "auto" else options.backend
    )
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    console.print(f"vitkernels {__version__} on {machine}; fused runs on backend {backend!r}")

    console.print("1. Handwritten digits: training")
    photo_threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(options.threads or 1)  # more would get in the way of so small a model
    digits = Digits.load(device)
    model = make_model(options.seed).to(device)
    with (
        use_backend(options.backend),
        bar(console, "train", plan.epochs * digits.steps_per_epoch()) as step,
    ):
        training = train(model, digits, plan.epochs, plan.peak_lr, options.seed, step)
    held_out = training.accuracies[-1]
    accurate = held_out >= ACCURACY
    verdict = "" if options.quick else f" (at least {ACCURACY:.0%}: {_word(accurate)})"
    console.print(
        f"   {held_out:.2%} of {len(digits.test_y)} held-out images right after {plan.epochs} "
        f"epochs, {training.seconds:.0f} s{verdict}"
    )

    console.print("2. The same training steps, three ways")
    with bar(console, "steps", 3 * plan.agreement_steps) as step:
        agreement = compare(
            training.checkpoint, digits, options.backend, plan.agreement_steps, options.seed, step
        )
    console.print(
        f"   loss from step {training.checkpoint['step']}: fused and reference differ by "
        f"{agreement.difference:.1e}, allowed {agreement.allowed:.1e}: {_word(agreement.holds)}"
    )

    console.print(f"3. Photographs: {plan.model}, batch {plan.batch}")
    torch.set_num_threads(photo_threads)
    photographs = photos.load_photographs()
    images = photos.make_batch(photographs, device)[: plan.batch]
    with bar(console, "rounds", 2 * (plan.rounds + 2)) as step:
        rows, timm_note = photos.measure(
            plan.model, images, options.backend, options.seed, plan.rounds, plan.budget_s, step
        )
    rows = [dataclasses.replace(r, backend=backend) if r.contender == "fused" else r for r in rows]
    has_timm = any(row.contender == "timm" for row in rows)
    table = Table(*report.HEADINGS)
    for row in rows:
        table.add_row(*report.cells(row))
    console.print(table)

    passed = agreement.holds and (accurate or options.quick)
    facts = {
        "passed": passed,
        "quick": options.quick,
        "versions": {
            "vitkernels": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": machine,
        "device": device.type,
        "backend": backend,
        "seed": options.seed,
        "digits": {
            "accuracy": held_out,
            "held_out": len(digits.test_y),
            "epochs": plan.epochs,
            "seconds": training.seconds,
            "threads": options.threads or 1,
            "losses": training.losses,
            "accuracies": training.accuracies,
        },
        "agreement": {
            "holds": agreement.holds,
            "steps": plan.agreement_steps,
            "from_step": training.checkpoint["step"],
            "loss_had_halved": training.checkpoint["halved"],
            "difference": agreement.difference,
            "divergence": agreement.reference_divergence,
            "allowed": agreement.allowed,
            "fused": agreement.fused,
            "reference": agreement.reference,
            "float64": agreement.float64,
        },
        "photographs": {
            "model": plan.model,
            "batch": plan.batch,
            "threads": photo_threads,
            "timm": "" if has_timm else timm_note,
        },
    }
    console.print("4. Report")
    with report.whole_folder(out) as folder:
        pictures.draw_curves(folder / "curves.png", training, agreement, digits.steps_per_epoch())
        pictures.draw_attention(
            (folder / "attention_last_block.png", folder / "attention_rollout.png"),
            training.model, digits, photos.square(photographs["china"]),
            photos.make_model(plan.model, options.seed, device), plan.model,
        )  # fmt: skip
        report.write_timings(folder, rows)
        facts["seconds"] = time.perf_counter() - start
        report.write_report(folder, facts, rows)
    console.print(f"   {out} written; {_word(passed)} in {facts['seconds']:.0f} s")
    return 0 if passed else 1


def _word(good: bool) -> str:
    return "passed" if good else "FAILED"
