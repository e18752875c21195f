"""python -m benchmarks [op ...] [--all] [--threads 1] [--seconds 3] [--warm] [--json FILE]

Exit status 1 when a check failed; its case is then named and not timed. A missed target is printed,
not an error: machines differ.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from pathlib import Path

import torch

from vitkernels.cli.bench import report

from . import (
    bench_add_layer_norm,
    bench_attention,
    bench_distillation_loss,
    bench_linear_gelu,
    bench_models,
    bench_patch_embed,
    bench_patch_merge,
    bench_window_attention,
)
from .harness import Limits, Result, measure

OPS = {
    "add_layer_norm": bench_add_layer_norm.cases,
    "attention": lambda everything: bench_attention.cases(everything, "attention"),
    "attention_qkvpacked": lambda everything: bench_attention.cases(
        everything, "attention_qkvpacked"
    ),
    "distillation_loss": bench_distillation_loss.cases,
    "patch_embed": bench_patch_embed.cases,
    "patch_merge_layer_norm": bench_patch_merge.cases,
    "window_attention": bench_window_attention.cases,
    "linear_gelu": lambda everything: bench_linear_gelu.cases(everything, "linear_gelu"),
    "linear": lambda everything: bench_linear_gelu.cases(everything, "linear"),
}


MODELS = "models"  # by name only: it takes minutes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("op", nargs="*", help=f"of {', '.join(OPS)} (default: these) or models")
    parser.add_argument("--all", action="store_true", help="every sample shape, not only targets")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing for each case")
    parser.add_argument("--warm", action="store_true", help="do not rotate the inputs")
    parser.add_argument("--json", type=Path, help="write the record here")
    options = parser.parse_args(arguments)
    unknown = [op for op in options.op if op not in (*OPS, MODELS)]
    if unknown:
        parser.error(f"op must be one of {', '.join(OPS)} or {MODELS}, got {', '.join(unknown)}")

    torch.set_num_threads(options.threads)
    limits = Limits.measured()
    print(machine_line(limits))
    results, failures = [], []
    raced: list[bench_models.Raced] = []
    if MODELS in options.op:
        raced = bench_models.run(4 * options.seconds)
        failures += bench_models.failures(raced)
    for op in [op for op in options.op if op != MODELS] or ([] if raced else OPS):
        for case in OPS[op](options.all):
            try:
                result = measure(case, limits, options.seconds, options.warm)
            except AssertionError as error:
                failures.append(case.title)
                print(f"\n{case.title}\n  CHECK FAILED, not timed: {error}")
                continue
            results.append(result)
            print(f"\n{case.title}\n{table(result)}", flush=True)
    aims = bench_models.targets(raced)
    if options.json:
        found = record(limits, results, failures)
        found["models"] = [report.record(*of_model) for of_model in raced]
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{summary(results, failures, aims)}")
    return 1 if failures else 0


def table(result: Result) -> str:
    flops, moved = result.case.cost
    lines = [f"  {'':16}{'best us':>10}{'median us':>11}{'GB/s':>8}{'GFLOP/s':>9}{'ratio':>8}"]
    for name, timing in sorted(result.timings.items(), key=lambda item: item[1].best):
        ratio = "" if name == "vitkernels" else f"{result.ratio(name):.2f}x"
        lines.append(
            f"  {name:16}{timing.best * 1e6:10.1f}{timing.median * 1e6:11.1f}"
            f"{moved / timing.best / 1e9:8.1f}{flops / timing.best / 1e9:9.1f}{ratio:>8}"
        )
    lines.append(f"  {result.share:.0%} of the {result.bound} limit of this machine")
    for peer, ratio, must, stretch in result.targets():
        lines.append(f"  against {peer}: {ratio:.2f}x, {verdict(ratio, must, stretch)}")
    return "\n".join(lines)


def verdict(ratio: float, must: float, stretch: float) -> str:
    met = "stretch met" if ratio >= stretch else "must met" if ratio >= must else "MISSED"
    return f"must {must}x, stretch {stretch}x: {met}"


def summary(results: list[Result], failures: list[str], of_models: list[tuple] = ()) -> str:
    lines = [f"{'target':64}{'measured':>10}{'must':>7}{'stretch':>9}"]
    aims = [(result.case.title, *aim) for result in results for aim in result.targets()]
    for title, peer, ratio, must, stretch in [*aims, *of_models]:
        missed = "  MISSED" if ratio < must else ""
        lines.append(f"{f'{title} / {peer}':76}{ratio:8.2f}{must:7.2f}{stretch:9.2f}{missed}")
    if len(lines) == 1:
        lines = [f"{len(results)} cases, none with a target"]
    return "\n".join([*lines, *(f"CHECK FAILED: {title}" for title in failures)])


def machine_line(limits: Limits) -> str:
    rates = ", ".join(
        f"{str(dtype).removeprefix('torch.')} products {rate / 1e9:.0f} GFLOP/s"
        for dtype, rate in limits.flops_per_second.items()
    )
    return (
        f"{cpu_name()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s); "
        f"copy {limits.bytes_per_second / 1e9:.1f} GB/s, {rates}"
    )


def record(limits: Limits, results: list[Result], failures: list[str]) -> dict:
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "copy_bytes_per_second": limits.bytes_per_second,
        "product_flops_per_second": {str(d): r for d, r in limits.flops_per_second.items()},
        "failed_checks": failures,
        "results": [
            {
                "op": result.case.op,
                "name": result.case.name,
                "shape": result.case.shape,
                "dtype": str(result.case.dtype),
                "direction": result.case.direction,
                "flops": result.case.cost[0],
                "bytes": result.case.cost[1],
                "share_of_limit": result.share,
                "bound": result.bound,
                "seconds": {
                    n: {"best": t.best, "median": t.median} for n, t in result.timings.items()
                },
                "targets": [
                    {"peer": p, "ratio": r, "must": m, "stretch": s}
                    for p, r, m, s in result.targets()
                ],
            }
            for result in results
        ],
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
