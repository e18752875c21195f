"""What is checked on an NVIDIA GPU, as data: `make test-gpu`, tests/test_gpu.py and the sanitizer.

A case is one problem of one operator on one kernel. NUMERICS has the real shapes, 16-bit dtypes
first; SMALL has shapes that the sanitizer, the emulator and Triton's interpreter get through.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
from collections.abc import Iterator

import torch
from attention_problems import attention_problem, packed_problem
from distillation_problems import distillation_problem
from layer_norm_problems import layer_norm_add_problem, layer_norm_problem
from linear_gelu_problems import linear_gelu_problem, linear_problem
from patch_embed_problems import IMAGE_LAYOUTS, UINT8, patch_embed_problem
from patch_merge_problems import patch_merge_problem
from problems import DTYPE_IDS, Problem, check, output_gradients
from window_attention_problems import MAP_LAYOUTS, pair, window_problem

from vitkernels import _native, _regimes, testing
from vitkernels.evidence.outcome import FAILED, NOT_RUN, PASSED, Outcome, outcome_of
from vitkernels.evidence.shapes import HAS_PATHS, PATHS

FP32, BF16, FP16 = DTYPE_IDS
DTYPES = (BF16, FP16, FP32)
MAKERS = {
    "add_layer_norm": layer_norm_problem,
    "layer_norm_add": layer_norm_add_problem,
    "attention": attention_problem,
    "attention_qkvpacked": packed_problem,
    "window_attention": window_problem,
    "patch_embed": patch_embed_problem,
    "patch_merge_layer_norm": patch_merge_problem,
    "linear_gelu": linear_gelu_problem,
    "linear": linear_problem,
    "distillation_loss": distillation_problem,
}


def kernels(op: str) -> list[tuple[str, str]]:
    """(backend, path) of every kernel that an operator could have; one that refuses says so."""
    paths = PATHS if op in HAS_PATHS else ("",)
    return [*(("cuda", path) for path in paths), ("triton", "")]


@dataclasses.dataclass(frozen=True)
class Case:
    """arguments: of the operator's maker, before and after the dtype."""

    op: str
    backend: str
    path: str
    dtype: torch.dtype
    shape: str
    arguments: tuple
    options: tuple[tuple[str, object], ...] = ()
    layout: str = "contiguous"
    grad_layout: str | None = None
    factor: float | None = None
    slack: float = 1.0

    @property
    def name(self) -> str:
        kernel = f"{self.backend}:{self.path}" if self.path else self.backend
        return f"{self.op} {kernel} {DTYPE_IDS[self.dtype]} {self.shape} {self.layout}"

    def problem(self, device: str) -> Problem:
        options = dict(self.options)
        return MAKERS[self.op](*self.arguments, dtype=self.dtype, **options).to(device)

    def kernel(self) -> contextlib.AbstractContextManager:
        return testing.cuda_path(self.path) if self.path else contextlib.nullcontext()

    def facts(self) -> dict:
        """What a record says of the case, whatever came of it."""
        return {"op": self.op, "backend": self.backend, "path": self.path}

    def outcome(self, device: str, *, values: bool = True) -> Outcome:
        """With the regimes that a failure counts against."""
        found = outcome_of(lambda: self.run(device, values=values))
        told = {"regimes": regimes(self.problem("cpu"))} if found.status == FAILED else {}
        return dataclasses.replace(found, facts=self.facts() | told)

    def run(self, device: str, *, values: bool = True) -> Outcome:
        """Forward and every gradient; without `values` they are run and not compared."""
        missing = _native.missing[self.backend]
        if missing is not None:
            return Outcome(NOT_RUN, missing)
        problem = self.problem(device)
        with self.kernel():
            if values:
                check(
                    problem,
                    self.backend,
                    shape_class=f"{self.path} {self.shape}".strip(),
                    layout=self.layout,
                    grad_layout=self.grad_layout,
                    rmse_factor=self.factor,
                    slack=self.slack,
                )
            else:
                run_through(problem.laid_out(self.layout), self.backend)
        return Outcome(PASSED)


def run_through(problem: Problem, backend: str) -> None:
    tensors = list(problem.inputs.values())
    with torch.no_grad():
        outputs = testing.as_tuple(problem.ours(backend)(*tensors))
    testing.grads_of(problem.ours(backend), tensors, output_gradients(problem, outputs))
    if outputs[0].is_cuda:
        torch.cuda.synchronize()


def regimes(problem: Problem) -> list[str]:
    """Of both directions: what `choose` would call them."""
    inputs, variant = problem.inputs, ""
    dtypes = tuple(t.dtype for t in inputs.values() if t is not None)
    if problem.op == "attention":
        sizes = (inputs["k"].shape[1], inputs["k"].shape[3])
    elif problem.op == "attention_qkvpacked":
        _, N, width = inputs["qkv"].shape
        sizes = (N, width // (3 * problem.options["num_heads"]))
    elif problem.op == "window_attention":
        Wh, Ww = pair(problem.options["window_size"])
        sizes = (Wh * Ww, inputs["qkv"].shape[3] // (3 * problem.options["num_heads"]))
        variant = "cosine" if "logit_scale" in inputs else ""
    elif problem.op == "patch_embed":
        sizes = (inputs["weight"].shape[1:].numel(),)
    elif problem.op == "distillation_loss":
        sizes = (inputs["logits"].shape[1],)
        dtypes += tuple(problem.options[n].dtype for n in ("teacher_logits", "targets"))
    else:
        C = inputs["x"].shape[-1]
        sizes = (4 * C,) if problem.op == "patch_merge_layer_norm" else (C,)
    if "bias" in {**inputs, **problem.options} and problem.op in (
        "attention",
        "attention_qkvpacked",
    ):
        variant = "bias"
    return [_regimes.regime(problem.op, dtypes, t, sizes, variant) for t in (False, True)]


def _cases(op, shape, *arguments, dtypes=DTYPES, layouts=("contiguous",), **others) -> list[Case]:
    names = {f.name for f in dataclasses.fields(Case)}
    fields = {name: others.pop(name) for name in list(others) if name in names}
    options = tuple(others.items())
    return [
        Case(op, backend, path, dtype, shape, arguments, options, layout, **fields)
        for dtype, layout, (backend, path) in itertools.product(dtypes, layouts, kernels(op))
    ]


def _attention_factor(N: int, dtype: torch.dtype) -> float | None:
    return 0.9 if dtype != FP32 and N >= 49 else None


def _layer_norms() -> Iterator[Case]:
    for C in (1, 3, 96, 192, 384, 768, 1000, 1024, 1280, 1536, 4096, 8192):
        yield from _cases("add_layer_norm", f"C{C}", (3, 197, C))
    for shape in ((16, 3136, 96), (64, 197, 768), (64, 50, 1280)):  # several rows for every team
        yield from _cases("add_layer_norm", f"C{shape[-1]} many rows", shape, dtypes=(BF16,))
    layouts = ("transposed", "sliced", "expanded", "misaligned_1", "nan_border")
    yield from _cases("add_layer_norm", "C384", (4, 50, 384), dtypes=(BF16,), layouts=layouts)
    yield from _cases("add_layer_norm", "C384 dropout", (4, 50, 384), dropout_p=0.1)
    encoder = {"dropout_p": 0.1, "gamma": False, "row_scale": False}  # nn.EncoderBlock's
    for C in (96, 256, 512, 768, 1024, 1280, 4096):
        rows = (64, 50, C) if C < 4096 else (8, 50, C)
        yield from _cases("add_layer_norm", f"C{C} dropout", rows, dtypes=(BF16, FP32), **encoder)
    autocast = {"residual_dtype": FP32, "param_dtype": FP32, "dtypes": (BF16, FP16)}
    for C, options in itertools.product((192, 768), ({}, encoder)):
        name = f"C{C} fp32 stream{' dropout' if options else ''}"
        yield from _cases("add_layer_norm", name, (64, 50, C), **autocast, **options)
        post_norm = {"out_dtype": FP32, "gamma": False} | options
        yield from _cases("add_layer_norm", f"{name} fp32 y", (64, 50, C), **autocast, **post_norm)
    for C in (192, 768):
        yield from _cases("layer_norm_add", f"C{C} fp32 stream", (64, 50, C), **autocast)
    for C in (96, 768, 1536):
        yield from _cases("layer_norm_add", f"C{C}", (3, 196, C))
    for C in (96, 384):
        yield from _cases("patch_merge_layer_norm", f"C{C}", (2, 14, 13, C))
    yield from _cases(
        "patch_merge_layer_norm", "C96", (2, 14, 14, 96), dtypes=(BF16,), layouts=layouts
    )


def _attentions() -> Iterator[Case]:
    for dtype in DTYPES:
        for N, D in itertools.product(
            (1, 49, 50, 64, 65, 144, 196, 197, 198, 256, 257, 577, 1025),
            (16, 32, 48, 64, 72, 80, 88, 96, 128),
        ):
            if N in (1, 64, 197, 577, 1025) or D in (32, 64, 80):
                options = {"dtypes": (dtype,), "factor": _attention_factor(N, dtype)}
                yield from _cases("attention_qkvpacked", f"N{N} D{D}", 2, N, 3, D, **options)
        for N in (1370, 4097):
            options = {"dtypes": (dtype,), "factor": _attention_factor(N, dtype)}
            yield from _cases("attention_qkvpacked", f"N{N} D64", 1, N, 2, 64, **options)
    for bias in ((2, 3, 197, 197), (1, 3, 197, 197), (1, 1, 197, 197)):
        yield from _cases("attention", f"N197 D64 bias {bias}", 2, 197, 3, 64, bias=bias)
    for bias in ((1, 3, 577, 577), (2, 1, 577, 577), (2, 3, 1, 577)):
        yield from _cases("attention", f"N577 D64 bias {bias}", 2, 577, 3, 64, bias=bias)
    yield from _cases("attention_qkvpacked", "N577 D64 dropout", 2, 577, 3, 64, dropout_p=0.1)
    many = {"Nk": 1370, "key_padding_mask": (2, 1370), "dtypes": (BF16,)}
    yield from _cases("attention", "N300 Nk1370 D80 padding", 2, 300, 3, 80, **many)
    padded = {"Nk": 257, "key_padding_mask": (2, 257), "dtypes": (BF16,)}
    yield from _cases("attention", "N50 Nk257 D64 padding", 2, 50, 3, 64, **padded)
    yield from _cases("attention_qkvpacked", "N197 D64 dropout", 2, 197, 3, 64, dropout_p=0.1)
    yield from _long_attentions()
    layouts = ("transposed", "sliced", "expanded", "offset", "misaligned_1", "packed", "nan_border")
    of_layouts = {"dtypes": (BF16,), "layouts": layouts, "grad_layout": "contiguous"}
    yield from _cases("attention", "N50 D64", 2, 50, 3, 64, **of_layouts)
    yield from _cases("attention_qkvpacked", "N197 D64", 2, 197, 3, 64, **of_layouts)


def _long_attentions() -> Iterator[Case]:
    """Every option beyond 272 tokens, and lengths of queries and keys that differ."""
    one = {"dtypes": (BF16, FP16)}
    for bias in ((2, 3, 577, 577), (1, 3, 577, 577), (1, 1, 1, 577), (2, 3, 577, 1)):
        yield from _cases("attention", f"N577 D64 bias {bias}", 2, 577, 3, 64, bias=bias, **one)
    masked = {"bool_bias": (1, 1, 1370, 1370), "key_padding_mask": (2, 1370)}
    yield from _cases("attention", "N1370 D64 masks", 2, 1370, 2, 64, **masked, **one)
    for D in (64, 72, 96, 128):
        name = f"N577 D{D} dropout"
        yield from _cases("attention_qkvpacked", name, 2, 577, 3, D, dropout_p=0.1, **one)
    yield from _cases("attention", "N1025 Nk577 D64", 2, 1025, 3, 64, Nk=577, **one)
    yield from _cases("attention", "N50 Nk1370 D80", 2, 50, 3, 80, Nk=1370, **one)
    both = {"bias": (1, 3, 197, 197), "dropout_p": 0.1}
    yield from _cases("attention", "N197 D64 bias dropout", 2, 197, 3, 64, **both, **one)


def _window_attentions() -> Iterator[Case]:
    windows = (1, 2, 4, 6, 7, 8, 10, 12, 14, 16, 24, (7, 8), (4, 16), (24, 3))
    for dtype, window, shifted, cosine in itertools.product(
        DTYPES, windows, (False, True), (False, True)
    ):
        Wh, Ww = pair(window)
        shift, D = ((Wh // 2, Ww // 2) if shifted else 0), 32 if Wh * Ww <= 256 else 16
        name = f"window {window} D{D}{' shifted' * shifted}{' cosine' * cosine}"
        made = {"windows": (3, 4), "heads": 6, "D": D, "cosine": cosine}
        factor = _attention_factor(Wh * Ww, dtype)
        options = {"dtypes": (dtype,), "factor": factor, **made}
        yield from _cases("window_attention", name, window, shift, **options)
    for D in (8, 16, 24, 48, 64, 80, 128):
        made = {"windows": (8, 8), "heads": 3, "D": D, "dropout_p": 0.1}
        yield from _cases("window_attention", f"window 7 D{D} dropout", 7, 3, **made)
    layouts = (*MAP_LAYOUTS, "misaligned_1", "expanded", "nan_border")
    of_layouts = {"dtypes": (BF16,), "layouts": layouts, "grad_layout": "contiguous"}
    yield from _cases("window_attention", "window 7 D32", 7, (3, 0), heads=3, D=32, **of_layouts)


def _products() -> Iterator[Case]:
    shapes = ((16, 14, 384), (16, 14, 768), (32, 7, 768), (14, 16, 384), (8, 14, 192))
    for (patch, grid, D), dtype in itertools.product(
        (*shapes, (4, 28, 96), (16, (3, 5), 97)), DTYPES
    ):
        for images in (UINT8, dtype):
            name = f"patch {patch} grid {grid} D{D} {'uint8' if images == UINT8 else 'float'}"
            yield from _cases("patch_embed", name, grid, patch, D, images, dtypes=(dtype,))
    layouts = (*IMAGE_LAYOUTS, "misaligned_1", "nan_border")
    for images in (UINT8, BF16):
        name = f"patch 16 D192 {'uint8' if images == UINT8 else 'float'} 5 tokens"
        of_layouts = {"dtypes": (BF16,), "layouts": layouts, "grad_layout": "contiguous"}
        yield from _cases("patch_embed", name, 7, 16, 192, images, prefix=5, **of_layouts)
    for approximate, save in itertools.product(("none", "tanh", "quick"), (True, False)):
        for rows, K, N in ((394, 384, 1536), (197, 97, 129), (1, 768, 1000)):
            name = f"M{rows} K{K} N{N} {approximate}{'' if save else ' recomputed'}"
            options = {"approximate": approximate, "save_preactivation": save}
            options["slack"] = 1.1 if rows == 1 else 1.0  # an outer product's errors have a mean
            yield from _cases("linear_gelu", name, (rows, K), N, **options)
    layouts = ("contiguous", "transposed", "sliced", "expanded", "misaligned_3")
    yield from _cases("linear", "M394 K384 N320", (2, 197, 384), 320, layouts=layouts)


def _losses() -> Iterator[Case]:
    """The kinds at ImageNet's classes, then widths that are odd, aligned, and beyond one block."""
    kinds = {
        "soft": {"temperature": 3.0, "label_smoothing": 0.1},
        "hard": {"kind": "hard"},
        "mixup": {"soft_targets": FP32, "label_smoothing": 0.1, "reduction": "deit"},
        "bf16 teacher": {"teacher_dtype": BF16},
    }
    for kind, options in kinds.items():
        yield from _cases("distillation_loss", f"K1000 {kind}", (300, 1000), **options)
        yield from _cases("distillation_loss", f"K21841 {kind}", (9, 21841), **options)
    for K in (2, 3, 10, 100, 1024, 1025, 2049, 4100, 8192, 11221, 65536):
        yield from _cases("distillation_loss", f"K{K}", (5, K), temperature=2.0)
    for B in (1, 2, 31, 5000):
        yield from _cases("distillation_loss", f"B{B} K40", (B, 40), grad_layout="ones")
    layouts = ("transposed", "sliced", "expanded", "misaligned_1", "nan_border")
    of_layouts = {"dtypes": (BF16,), "layouts": layouts, "grad_layout": "contiguous"}
    for K in (104, 5000):
        yield from _cases("distillation_loss", f"K{K} layouts", (6, K), **of_layouts)


def _small() -> Iterator[Case]:
    """Sizes off the tiles' edges, most options, both 16-bit dtypes and fp32."""
    for dtype in (BF16, FP32):
        one = {"dtypes": (dtype,)}
        yield from _cases("add_layer_norm", "C24", (2, 5, 24), **one)
        yield from _cases("add_layer_norm", "C200 many rows", (45, 3, 200), **one)
        yield from _cases("layer_norm_add", "C40", (2, 3, 40), **one)
        yield from _cases("attention_qkvpacked", "N17 D16", 1, 17, 2, 16, **one)
        yield from _cases("attention_qkvpacked", "N65 D64", 1, 65, 1, 64, **one)
        bias = {"bias": (1, 1, 9, 11), "Nk": 11, "key_padding_mask": (2, 11)}
        yield from _cases("attention", "N9 Nk11 D32 bias padding", 2, 9, 1, 32, **bias, **one)
        yield from _cases("window_attention", "window 2 3 shifted D32", (2, 3), 1, D=32, **one)
        cosine = {"cosine": True, "heads": 2, "D": 32, "B": 1}
        yield from _cases("window_attention", "window 4 cosine D32", 4, 0, **cosine, **one)
        yield from _cases("patch_embed", "patch 4 D24", (2, 3), 4, 24, UINT8, **one)
        for C in (6, 24, 264):
            yield from _cases("patch_merge_layer_norm", f"C{C}", (1, 5, 4, C), **one)
        yield from _cases("linear_gelu", "M10 K24 N40", (2, 5, 24), 40, **one)
        yield from _cases("linear", "M10 K24 N40", (2, 5, 24), 40, **one)
        for K in (41, 1100, 8200):
            soft = {"temperature": 2.0, "label_smoothing": 0.1}
            yield from _cases("distillation_loss", f"K{K} soft", (2, K), **soft, **one)
        mixup = {"kind": "hard", "soft_targets": FP32, "label_smoothing": 0.1}
        yield from _cases("distillation_loss", "K40 hard mixup", (3, 40), **mixup, **one)
    yield from _cases("attention_qkvpacked", "N50 D64", 1, 50, 1, 64, dtypes=(FP16,))
    tail = {"Nk": 273, "dropout_p": 0.1, "dtypes": (BF16,)}
    yield from _cases("attention", "N129 Nk273 D64 dropout", 1, 129, 1, 64, **tail)
    for D in (64, 72):
        long = {"Nk": 280, "bias": (1, 1, 9, 280), "dtypes": (BF16,)}
        yield from _cases("attention", f"N9 Nk280 D{D} bias", 2, 9, 1, D, **long)
    yield from _cases("window_attention", "window 7 shifted D32", 7, 3, D=32, B=1, dtypes=(FP16,))


def _numerics() -> list[Case]:
    """16-bit first, and mixed within: what a run cut short has shown is of every operator."""
    cases = [
        *_layer_norms(), *_attentions(), *_window_attentions(), *_products(), *_losses(),
    ]  # fmt: skip
    random.Random(0).shuffle(cases)
    return sorted(cases, key=lambda case: case.dtype == FP32)


NUMERICS = {case.name: case for case in _numerics()}
SMALL = {case.name: case for case in _small()}
