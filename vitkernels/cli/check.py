"""`vitkernels check`: a model of ours and timm's, the same weights, the same numbers."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import re
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import use_backend
from .arguments import DEFAULT_MODEL, DTYPES, SHORT, add_backend, add_device, one_or_many, positive
from .usage import check_backend, device_of, need, threads

EXACT = 1e-9  # norm-relative, of two float64 runs of one model
FACTOR = 2.0  # how far fused may be from timm's own error
FLOOR = 1e-6  # norm-relative: below it an fp32 error is rounding, whoever has more of it
# 16-bit noise scatters from one gradient to the next; all of them together do not.
MEDIAN_16_BIT = 1.1
SMALL = 1e-3  # gradients below this share of the largest one count against the share


def configure(commands) -> None:
    parser = commands.add_parser(
        "check",
        help="compare a model with timm's: logits and every gradient",
        description="Our model and timm's with the same weights: float64 on the reference backend "
        f"equal to {EXACT:g}, and the fused error in each dtype within {FACTOR:g} times timm's "
        "own. Exit status 0 when that holds, 1 when not.",
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME", help="timm's name")
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="a checkpoint (default: random weights)"
    )
    parser.add_argument("--image-size", type=positive, metavar="N")
    parser.add_argument("--batch", type=positive, default=2, metavar="N")
    parser.add_argument(
        "--dtype",
        type=one_or_many(DTYPES),
        default=["float32", "bfloat16"],
        metavar="D[,D]",
        help="float32, bfloat16, float16 (default: float32,bfloat16)",
    )
    parser.add_argument(
        "--all-gradients",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="of every parameter and of the images (default); without: logits only",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    add_backend(parser, "the fused model")
    add_device(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    need("check", "cli", "rich")
    from .output import console
    from .progress import bar
    from .timm_peer import need_timm

    need_timm("check")
    device = device_of(options.device)
    check_backend(options.backend)
    with threads(options.threads):
        theirs, ours = make_pair(options)
        theirs, ours = theirs.to(device), ours.to(device)
        out = console()
        where = f"{options.weights}" if options.weights else "random weights"
        out.print(
            f"{options.model}, {where}, batch {options.batch}; "
            f"fused on {options.backend!r}, {device}"
        )
        x = torch.randn(options.batch, ours.in_chans, *ours.patch_embed.img_size)
        with bar(console(stderr=True), "check", 2 + 2 * len(options.dtype)) as step:
            findings = compare(theirs, ours, x.to(device), options, step)
    out.print(_table(findings))
    good = all(finding.holds for finding in findings)
    out.print(_summary(findings))
    out.print("holds" if good else "DOES NOT HOLD")
    return 0 if good else 1


# --- the two models -------------------------------------------------------------------------------


def make_pair(options) -> tuple[nn.Module, nn.Module]:
    """timm's model and ours with equal weights, evaluating."""
    from . import naming

    torch.manual_seed(options.seed)
    settings = {} if options.image_size is None else {"img_size": options.image_size}
    naming.check_name(options.model)
    if options.weights is None:
        theirs = naming.make_timm_model(options.model, **settings)
        stir(theirs)
        return theirs, naming.from_timm_model(options.model, theirs)
    ours = naming.load_model(options.model, options.weights, **settings)
    theirs = naming.make_timm_model(options.model, num_classes=ours.num_classes, **settings)
    theirs.load_state_dict(ours.to_timm_state_dict(), strict=True)
    return theirs, ours


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """No parameter keeps its initial 0, 1 or 1e-5: each one must matter to the numbers."""
    for parameter in model.parameters():
        spread = 0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 0.2
        parameter.add_(torch.randn_like(parameter) * spread)


# --- the comparison -------------------------------------------------------------------------------


@dataclasses.dataclass
class Finding:
    """One line of the table."""

    what: str
    tensors: int
    logits: float  # our norm-relative error
    logits_of_timm: float | None
    worst: str  # the tensor that is furthest from the rule
    worst_ratio: float  # its error over timm's; in float64 the error itself
    holds: bool
    median: float | None = None  # of all ratios, in 16 bits


def compare(theirs: nn.Module, ours: nn.Module, x: Tensor, options, step) -> list[Finding]:
    """float64 against float64, then each dtype against timm's own error in it."""
    run = results if options.all_gradients else logits_only
    exact_theirs, exact_ours = (copy.deepcopy(m).double() for m in (theirs, ours))
    truth = run(exact_theirs, x.double())
    step("timm in float64")
    with use_backend("reference"):
        found = [exact_finding(errors(run(exact_ours, x.double()), truth))]
    step("ours in float64")
    del exact_theirs, exact_ours
    for name in options.dtype:
        dtype = DTYPES[name]
        base = errors(run(copy.deepcopy(theirs).to(dtype), x.to(dtype)), truth)
        step(f"timm in {name}")
        with use_backend(options.backend):
            mine = errors(run(copy.deepcopy(ours).to(dtype), x.to(dtype)), truth)
        step(f"ours in {name}")
        found.append(fused_finding(dtype, mine, base))
    return found


def logits_only(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"logits": model(x)}


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Logits, the images' gradient and every parameter's, for one fixed incoming gradient."""
    x = x.detach().clone().requires_grad_()
    parameters = dict(model.named_parameters())
    out = model(x)
    steps = torch.arange(out.numel(), dtype=torch.float64, device=out.device)
    direction = torch.sin(steps + 1).reshape(out.shape).to(out.dtype)
    wanted = {"images": x, **parameters}
    grads = torch.autograd.grad(out, list(wanted.values()), direction, allow_unused=True)
    return {"logits": out.detach()} | {
        name: grad for name, grad in zip(wanted, grads, strict=True) if grad is not None
    }


def errors(got: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Norm-relative error of each tensor; inf where there is a NaN, or no tensor."""
    norms = {name: value.double().norm().item() for name, value in truth.items()}
    floor = SMALL * max(norms.values())
    found = {}
    for name in {**truth, **got}:
        if name not in got or name not in truth:
            found[name] = float("inf")
            continue
        error = (got[name].double() - truth[name]).norm().item() / max(norms[name], floor)
        found[name] = error if error == error else float("inf")
    return found


def exact_finding(mine: dict[str, float]) -> Finding:
    worst = max(mine, key=mine.__getitem__)
    return Finding(
        "fp64", len(mine), mine["logits"], None, worst, mine[worst], mine[worst] <= EXACT
    )


def fused_finding(dtype: torch.dtype, mine: dict[str, float], base: dict[str, float]) -> Finding:
    ratios = _ratios(dtype, mine, base)
    worst = max(ratios, key=ratios.__getitem__)
    holds = excess(dtype, mine, base) <= 1
    median = None if dtype == torch.float32 else statistics.median(ratios.values())
    return Finding(
        SHORT[dtype], len(mine), mine["logits"], base["logits"], worst, ratios[worst], holds, median
    )


def excess(dtype: torch.dtype, mine: dict[str, float], base: dict[str, float]) -> float:
    """The worst error of ours over what base's allows; at most 1 is within the error model.

    Each tensor within twice base's error; in 16 bits the median of all within 1.1 times.
    """
    ratios = _ratios(dtype, mine, base)
    worst = max(ratios.values()) / FACTOR
    if dtype == torch.float32 or len(ratios) == 1:
        return worst
    return max(worst, statistics.median(ratios.values()) / MEDIAN_16_BIT)


def _ratios(dtype: torch.dtype, mine: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    """Our error over base's, or over half of what is rounding anyway."""
    floor = FLOOR if dtype == torch.float32 else torch.finfo(dtype).eps / 16
    base = _usual(base)
    return {key: mine[key] / max(base.get(key, 0.0), floor / FACTOR) for key in mine}


def _usual(base: dict[str, float]) -> dict[str, float]:
    """Each error, or the median of this tensor's in all blocks where it is below that: the error of
    a tensor of few numbers, such as a logit_scale, is sometimes small by luck."""
    kinds: dict[str, list[float]] = {}
    for key, error in base.items():
        kinds.setdefault(re.sub(r"\d+", "", key), []).append(error)
    medians = {kind: statistics.median(found) for kind, found in kinds.items()}
    return {key: max(error, medians[re.sub(r"\d+", "", key)]) for key, error in base.items()}


def _table(findings: list[Finding]):
    from .output import table

    made = table("", "logits", "timm's", "furthest", "error", "allowed", "")
    for f in findings:
        exact = f.logits_of_timm is None
        made.add_row(
            f.what,
            f"{f.logits:.1e}",
            "" if exact else f"{f.logits_of_timm:.1e}",
            f.worst,
            f"{f.worst_ratio:.1e}" if exact else f"{f.worst_ratio:.2f}x",
            f"{EXACT:g}" if exact else f"{FACTOR:g}x",
            "holds" if f.holds else "FAILS",
        )
    return made


def _summary(findings: list[Finding]) -> str:
    lines = [
        f"{findings[0].tensors} tensors, errors relative to float64: fp64 on the reference backend "
        "against timm,\nthe others fused, as multiples of timm's own error in that dtype"
    ]
    for f in findings:
        if f.median is not None:
            lines.append(f"{f.what}: the median is {f.median:.2f}x, allowed {MEDIAN_16_BIT:g}x")
    return "\n".join(lines)
