"""timm, which `check` and `bench` put beside our model; it need not be installed."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator

import torch

from .usage import UsageError, installed, one_line

# torchvision's registry wheel is a CUDA build: its own library does not load beside a CPU-only
# torch, and its Python code, which timm imports, then asks for these names.
_TORCHVISION_OPS = (
    "nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d",
)  # fmt: skip


@functools.cache
def import_timm():
    """timm, or None where it is not installed; UsageError where it is and does not import."""
    if not installed("timm"):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            try:
                import timm
            except RuntimeError as error:  # operator torchvision::nms does not exist
                if "torchvision::" not in str(error):
                    raise
                _define_torchvision_ops()
                import timm
        except Exception as error:
            raise UsageError(
                f"timm does not import here ({one_line(error)}): pip install torchvision for the "
                "torch that is installed"
            ) from error
    return timm


def need_timm(command: str):
    """timm, or one line that says how to install it."""
    timm = import_timm()
    if timm is None:
        raise UsageError(
            f"{command} compares with timm, which is not installed: pip install "
            "'vitkernels[timm]' or pip install timm"
        )
    return timm


@contextlib.contextmanager
def fused_attention(level: int) -> Iterator[None]:
    """What the environment variable TIMM_FUSED_ATTN sets, for the models made inside the block.

    0: timm's own products and softmax; 1, its default: torch's SDPA where timm calls that tested;
    2: also where it calls that experimental, such as Swin.
    """
    from timm.layers import set_fused_attn, use_fused_attn

    before = use_fused_attn() + use_fused_attn(experimental=True)
    set_fused_attn(level > 0, experimental=level > 1)
    try:
        yield
    finally:
        set_fused_attn(before > 0, experimental=before > 1)


@functools.cache
def _define_torchvision_ops() -> torch.library.Library:
    """The names without an implementation; kept, because a Library that dies takes them away."""
    library = torch.library.Library("torchvision", "DEF")
    for op in _TORCHVISION_OPS:
        library.define(f"{op}(Tensor a) -> Tensor")
        library.define(f"_{op}_backward(Tensor a) -> Tensor")
    return library
