"""The four stages of the demo, in order, and what each one says."""

from __future__ import annotations

import argparse
import dataclasses
import platform
import time
from pathlib import Path

import torch
from rich.console import Console

from ... import use_backend
from ..._version import __version__
from ..info import cpu_name, taken_backend
from ..output import table
from ..progress import bar
from . import Plan, agreement, digits, photos, pictures, report

ACCURACY = 0.97


class Demo:
    """One run: train, compare, time, report."""

    def __init__(self, options: argparse.Namespace, plan: Plan, device: torch.device):
        self.plan, self.device, self.quick = plan, device, options.quick
        self.seed, self.forced = options.seed, options.backend
        self.photo_threads = options.threads or torch.get_num_threads()
        self.digit_threads = options.threads or 1  # more get in the way of so small a model
        auto = self.forced == "auto"
        self.backend = taken_backend("add_layer_norm", device) if auto else self.forced
        self.machine = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
        self.console = Console(highlight=False, soft_wrap=True)
        self.start = time.perf_counter()

    def run(self, out: Path) -> bool:
        """Whether accuracy and agreement hold."""
        self.say(f"vitkernels {__version__} on {self.machine}; fused runs on {self.backend!r}")
        torch.set_num_threads(self.digit_threads)
        self.train_digits()
        self.compare_steps()
        torch.set_num_threads(self.photo_threads)
        self.time_photographs()
        self.passed = self.agreement.holds and (self.accurate or self.quick)
        self.write(out)
        return self.passed

    def say(self, text: str) -> None:
        self.console.print(text)

    def train_digits(self) -> None:
        self.say("1. Handwritten digits: training")
        plan = self.plan
        self.digits = digits.Digits.load(self.device)
        model = digits.make_model(self.seed).to(self.device)
        steps = plan.epochs * self.digits.steps_per_epoch()
        with use_backend(self.forced), bar(self.console, "train", steps) as step:
            self.training = digits.train(
                model, self.digits, plan.epochs, plan.peak_lr, self.seed, step
            )
        held_out = self.training.accuracies[-1]
        self.accurate = held_out >= ACCURACY
        claim = "" if self.quick else f" (at least {ACCURACY:.0%}: {_word(self.accurate)})"
        self.say(
            f"   {held_out:.2%} of {len(self.digits.test_y)} held-out images right after "
            f"{plan.epochs} epochs, {self.training.seconds:.0f} s{claim}"
        )

    def compare_steps(self) -> None:
        self.say("2. The same training steps, three ways")
        checkpoint, steps = self.training.checkpoint, self.plan.agreement_steps
        with bar(self.console, "steps", 3 * steps) as step:
            self.agreement = agreement.compare(
                checkpoint, self.digits, self.forced, steps, self.seed, step
            )
        found = self.agreement
        self.say(
            f"   loss from step {checkpoint['step']}: fused and reference differ by "
            f"{found.difference:.1e}, allowed {found.allowed:.1e}: {_word(found.holds)}"
        )

    def time_photographs(self) -> None:
        plan = self.plan
        self.say(f"3. Photographs: batches of {plan.batch}; differences of logits from float64's")
        self.photographs = photos.load_photographs()
        images = photos.make_batch(self.photographs, self.device)[: plan.batch]
        rows = []
        with bar(self.console, "rounds", len(plan.models) * 2 * (plan.rounds + 2)) as step:
            for model in plan.models:
                found, self.timm_note = photos.measure(
                    model, images, self.forced, self.seed, plan.rounds, plan.budget_s, step
                )
                rows += found
        self.rows = [
            dataclasses.replace(row, backend=self.backend) if row.contender == "fused" else row
            for row in rows
        ]
        if any(row.contender == "timm" for row in rows):
            self.timm_note = ""
        for model in plan.models:  # a table each: with their names the lines pass 80 columns
            timings = table(*report.HEADINGS[1:], left=2, title=model)
            for row in self.rows:
                if row.model == model:
                    timings.add_row(*report.cells(row)[1:])
            self.console.print(timings)
            self.console.print()

    def write(self, out: Path) -> None:
        self.say("4. Report")
        training, plan = self.training, self.plan
        with report.whole_folder(out) as folder:
            pictures.draw_curves(
                folder / "curves.png", training, self.agreement, self.digits.steps_per_epoch()
            )
            pictures.draw_attention(
                (folder / "attention_last_block.png", folder / "attention_rollout.png"),
                training.model,
                self.digits,
                photos.square(self.photographs["china"]),
                photos.make_model(plan.models[0], self.seed, self.device),
                plan.models[0],
            )
            report.write_timings(folder, self.rows)
            facts = self.facts()
            report.write_report(folder, facts, self.rows)
        self.say(f"   {out} written; {_word(self.passed)} in {facts['seconds']:.0f} s")

    def facts(self) -> dict:
        """What report.json holds."""
        training, found, plan = self.training, self.agreement, self.plan
        return {
            "passed": self.passed,
            "quick": self.quick,
            "seconds": time.perf_counter() - self.start,
            "versions": {
                "vitkernels": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "machine": self.machine,
            "device": self.device.type,
            "backend": self.backend,
            "seed": self.seed,
            "digits": {
                "accuracy": training.accuracies[-1],
                "held_out": len(self.digits.test_y),
                "epochs": plan.epochs,
                "seconds": training.seconds,
                "threads": self.digit_threads,
                "losses": training.losses,
                "accuracies": training.accuracies,
            },
            "agreement": {
                "holds": found.holds,
                "steps": plan.agreement_steps,
                "from_step": training.checkpoint["step"],
                "loss_had_halved": training.checkpoint["halved"],
                "difference": found.difference,
                "divergence": found.reference_divergence,
                "allowed": found.allowed,
                "fused": found.fused,
                "reference": found.reference,
                "float64": found.float64,
            },
            "photographs": {
                "models": plan.models,
                "batch": plan.batch,
                "threads": self.photo_threads,
                "timm": self.timm_note,
            },
        }


def _word(good: bool) -> str:
    return "passed" if good else "FAILED"
