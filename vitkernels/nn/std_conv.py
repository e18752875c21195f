"""Convolution with standardised weights; what is standardised is kept while nothing changes it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .._dispatch import autocast_dtype
from ..ops import linear
from .same_padding import pad_same
from .watched import plain


def standardize(weight: Tensor, eps: float) -> Tensor:
    """Weights of each output channel with mean 0 and biased variance 1 (Qiao et al. 2019)."""
    flat = weight.reshape(1, weight.shape[0], -1)
    return F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=eps).view_as(weight)


class _Kept(NamedTuple):
    """A standardised weight and what it was made of. `memory` keeps the old storage from being
    handed out again, so that its address tells a storage that was exchanged."""

    parameter: nn.Parameter
    memory: Tensor
    version: int
    steps: int
    eps: float
    weight: Tensor


# Of all optimizers since the first weight was kept: fused ones do not count up a weight's version,
# nor do those that write through .data.
_steps = [0]


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_count_step)


def _count_step(*_) -> None:
    if not torch.compiler.is_compiling():  # a compiled step counts the version up
        _steps[0] += 1


class StdConv2d(nn.Conv2d):
    """Conv2d on the standardised weight; padding "same" (TensorFlow's, JAX's) or "symmetric".

    In evaluation, without a gradient of the weight, the standardised weight is made once and made
    anew when the weight changes: in place, by an optimizer, load_state_dict, .to() or as another
    Parameter. train() and eval() forget it, too: what writes through .data leaves no trace.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: str = "same",
        bias: bool = False,
        eps: float = 1e-6,
        device=None,
        dtype=None,
    ):
        if padding not in ("same", "symmetric"):
            raise ValueError(f"StdConv2d: padding must be same or symmetric, got {padding!r}")
        self.same_pad = padding == "same" and (stride > 1 or kernel_size % 2 == 0)
        margin = 0 if self.same_pad else (stride - 1 + kernel_size - 1) // 2
        super().__init__(
            in_channels, out_channels, kernel_size, stride, margin,
            bias=bias, device=device, dtype=dtype,
        )  # fmt: skip
        self.eps, self._kept = eps, None
        self.register_load_state_dict_post_hook(StdConv2d._forget)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.standardized_weight(x.device)
        if self._is_product(x, weight):
            rows = x[..., :: self.stride[0], :: self.stride[1]].permute(0, 2, 3, 1)
            return linear(rows, weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        if self.same_pad:
            x = pad_same(x, self.kernel_size, self.stride)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)

    def _is_product(self, x: Tensor, weight: Tensor) -> bool:
        """1 x 1 in fp32 on a CPU: R50's map of 224 pixels takes 0.70 of the time of stock
        convolutions, a training step 0.86 (Zen 5); in 16 bits there is nothing to gain."""
        return (
            self.kernel_size == (1, 1)
            and x.device.type == "cpu"
            and x.dtype == weight.dtype == torch.float32
            and autocast_dtype(x.device) is None
            and plain(x, weight)
        )

    def standardized_weight(self, device: torch.device) -> Tensor:
        """In the weight's dtype, or in autocast's where it was kept in that."""
        weight = self.weight
        if not self._may_keep(weight):
            self._kept = None
            return standardize(weight, self.eps)
        dtype = weight.dtype if weight.dtype == torch.float64 else autocast_dtype(device)
        dtype, kept = dtype or weight.dtype, self._kept
        if (
            kept is not None
            and kept.parameter is weight
            and (kept.version, kept.steps) == (weight._version, _steps[0])
            and kept.memory.data_ptr() == weight.data_ptr()
            and (kept.eps, kept.weight.dtype) == (self.eps, dtype)
        ):
            return kept.weight
        with torch.inference_mode(False), torch.no_grad():  # an ordinary tensor, for any later call
            made = standardize(weight, self.eps).to(dtype)
        if type(made) is Tensor:  # a FakeTensor mode may be on
            _watch_optimizers()
            memory = weight.detach()
            self._kept = _Kept(weight, memory, weight._version, _steps[0], self.eps, made)
        return made

    def _may_keep(self, weight: Tensor) -> bool:
        """Not what a graph is recorded of: it must hold the standardisation itself."""
        return not (
            self.training
            or (torch.is_grad_enabled() and weight.requires_grad)
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or type(weight) is not nn.Parameter
            or weight.is_inference()
            or weight.is_meta
            or (weight.is_cuda and torch.cuda.is_current_stream_capturing())
        )

    def _forget(self, *_) -> None:
        self._kept = None

    def train(self, mode: bool = True) -> StdConv2d:
        self._forget()
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> StdConv2d:
        self._forget()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        """Copies and pickles make their own."""
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}, same_pad={self.same_pad}"
