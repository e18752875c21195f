"""The calls that stand for each regime: what `bench-gpu` and `tune` check and time.

`shape` is what people run on a GPU; `small` is a shape that the emulator and Triton's interpreter
get through in seconds, for the tests of all this on a CPU.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator

import torch

from .subject import BOTH, FORWARD, Subject

MODULES = {  # operator -> the file beside this one that makes its subjects
    "add_layer_norm": "add_layer_norm",
    "layer_norm_add": "add_layer_norm",
    "attention": "attention",
    "attention_qkvpacked": "attention",
    "window_attention": "window_attention",
    "patch_embed": "patch_embed",
    "patch_merge_layer_norm": "patch_merge",
    "linear_gelu": "linear_gelu",
    "linear": "linear_gelu",
    "distillation_loss": "distillation_loss",
}
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
PATHS = ("simt", "sm80", "sm90")  # of the operators whose CUDA launcher chooses among kernels
HAS_PATHS = (
    "attention", "attention_qkvpacked", "window_attention", "patch_embed", "linear_gelu", "linear",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """A named call. fp32: also timed in fp32. tune: among those of the two minutes."""

    op: str
    name: str
    shape: tuple[int, ...]
    small: tuple[int, ...]
    options: tuple[tuple[str, object], ...] = ()
    fp32: bool = False
    tune: bool = True

    def subject(self, device: str, *, small: bool = False, batch: int | None = None) -> Subject:
        shape = self.small if small else self.shape
        if batch is not None:
            rows = batch * 197 if MODULES[self.op] == "linear_gelu" else batch
            shape = (min(rows, shape[0]), *shape[1:])
        module = importlib.import_module(f".{MODULES[self.op]}", __package__)
        return module.subject(self.op, shape, device, **dict(self.options))


def _attention(name, shape, small=(1, 9, 2, 16), *, fp32=False, tune=True) -> list[Row]:
    """The packed form of a model's self-attention; the other form at the first shape only."""
    ops = ("attention_qkvpacked", "attention") if fp32 else ("attention_qkvpacked",)
    return [Row(op, name, shape, small, (), fp32, tune) for op in ops]


def _windows(name, shape, window, shift=0, *, fp32=False, tune=True) -> Row:
    cosine = name.startswith("swinv2")
    options = (("window", window), ("shift", shift), ("cosine", cosine))
    small = (1, 2 * window, window, 2, 8) if window <= 8 else (1, window, window, 1, 8)
    return Row("window_attention", name, shape, small, options, fp32, tune)


BIAS = (("bias", True),)
ROWS: tuple[Row, ...] = (
    *_attention("vit_base_224", (256, 197, 12, 64), fp32=True),
    *_attention("deit_tiny_50", (512, 50, 3, 64)),
    *_attention("vit_base_384", (64, 577, 12, 64)),
    *_attention("vit_huge_224", (128, 257, 16, 80)),
    *_attention("so400m_384", (32, 729, 16, 72), tune=False),
    *_attention("vit_large_512", (32, 1025, 16, 64), tune=False),
    *_attention("dinov2_large_518", (16, 1370, 16, 64)),
    *_attention("dinov3_7b", (16, 1029, 32, 128), tune=False),
    *_attention("head_dim_32", (128, 197, 12, 32), tune=False),
    Row("attention", "vit_base_224_bias", (64, 197, 12, 64), (1, 9, 2, 16), BIAS),
    Row("attention", "vit_base_384_bias", (16, 577, 12, 64), (1, 9, 2, 16), BIAS, tune=False),
    _windows("swin_tiny_stage1", (128, 56, 56, 3, 32), 7, fp32=True),
    _windows("swin_tiny_stage1_shifted", (128, 56, 56, 3, 32), 7, 3),
    _windows("swin_tiny_stage3_shifted", (128, 14, 14, 12, 32), 7, 3, tune=False),
    _windows("swinv2_tiny_stage1_shifted", (128, 64, 64, 3, 32), 8, 4),
    _windows("swin_base_384_stage1_shifted", (64, 96, 96, 4, 32), 12, 6),
    _windows("swinv2_base_stage1_shifted", (64, 64, 64, 4, 32), 16, 8),
    Row("add_layer_norm", "vit_base", (256, 197, 768), (2, 5, 24), fp32=True),
    Row("add_layer_norm", "vit_tiny", (512, 197, 192), (2, 5, 24)),
    Row("add_layer_norm", "vit_giant", (64, 257, 1408), (2, 5, 24)),
    Row("add_layer_norm", "dinov3_7b", (16, 1029, 4096), (2, 5, 24), tune=False),
    Row("layer_norm_add", "swinv2_tiny_stage1", (128, 4096, 96), (2, 5, 24), fp32=True),
    Row("layer_norm_add", "swinv2_base_stage3", (128, 256, 512), (2, 5, 24)),
    Row("patch_embed", "vit_base", (256, 3, 224, 224, 16, 768), (2, 3, 8, 8, 4, 24), fp32=True),
    Row("patch_embed", "swin_tiny", (128, 3, 224, 224, 4, 96), (2, 3, 8, 8, 4, 24)),
    Row("patch_merge_layer_norm", "swin_tiny_stage1", (128, 56, 56, 96), (1, 4, 4, 6), fp32=True),
    Row("patch_merge_layer_norm", "swin_tiny_stage3", (128, 14, 14, 384), (1, 4, 4, 6)),
    Row("linear_gelu", "vit_base", (256 * 197, 768, 3072), (10, 24, 40), fp32=True),
    Row("linear_gelu", "swin_tiny_stage1", (128 * 3136, 96, 384), (10, 24, 40)),
    Row("linear", "vit_base", (256 * 197, 768, 2304), (10, 24, 40), fp32=True, tune=False),
    Row("distillation_loss", "imagenet", (1024, 1000), (6, 40), fp32=True),
    Row("distillation_loss", "imagenet_hard", (1024, 1000), (6, 40), (("kind", "hard"),)),
    Row("distillation_loss", "imagenet_mixup", (1024, 1000), (6, 40), (("mixup", True),)),
    Row("distillation_loss", "imagenet21k_p", (512, 11221), (6, 40)),
    Row("distillation_loss", "imagenet21k", (512, 21841), (6, 40)),
    Row("distillation_loss", "dino_prototypes", (4096, 65536), (6, 40), tune=False),
)


@dataclasses.dataclass(frozen=True)
class Contest:
    """One row in one dtype and direction: what is checked, timed and judged together."""

    row: Row
    dtype: torch.dtype
    direction: str

    @property
    def name(self) -> str:
        return f"{self.row.op} {self.row.name} {SHORT[self.dtype]} {self.direction}"

    def facts(self) -> dict[str, str]:
        """What a record says of it, whatever comes of it."""
        regime = self.row.subject("cpu").regime(self.dtype, self.direction)
        return {"op": self.row.op, "regime": regime}


def contests(tune_only: bool = False) -> Iterator[Contest]:
    """16-bit before fp32, so that a run cut short has what people need most."""
    for dtype in (torch.bfloat16, torch.float32):
        for row in ROWS:
            if (tune_only and not row.tune) or (dtype == torch.float32 and not row.fp32):
                continue
            for direction in (FORWARD, BOTH):
                yield Contest(row, dtype, direction)


def contest_named(name: str) -> Contest:
    return next(c for c in contests() if c.name == name)
