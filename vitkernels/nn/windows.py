"""How a map (B, H, W, C) is cut into attention windows: size, shift, and what happens off the grid.

A block knows the window and shift it was built for; `Windows` is its decision for the map at hand,
made anew in each forward from the map's size alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[int, int]

PAD_MODES = ("pad_roll", "timm")
WINDOW_CLAMPS = ("axis", "min", "pad")


class Windows(NamedTuple):
    """Window and shift of the operator, and the padding at the bottom and right of the map.

    roll_first: the map is rolled before it is padded, so that its wrapped rows and columns lie in
    front of the padding. Otherwise the padded map is rolled. The same on the grid.
    """

    size: Pair
    shift: Pair = (0, 0)
    pad: Pair = (0, 0)
    roll_first: bool = False

    def fit(self, x: Tensor) -> Tensor:
        """The map as whole windows, zeros beyond its edges; x itself on the grid."""
        if self.pad == (0, 0):
            return x
        (down, right), (dy, dx) = self.pad, self.shift
        if not self.roll_first:
            return F.pad(x, (0, 0, 0, right, 0, down))
        x = F.pad(torch.roll(x, (-dy, -dx), (1, 2)), (0, 0, 0, right, 0, down))
        return torch.roll(x, (dy, dx), (1, 2))  # the operator rolls it once more

    def crop(self, x: Tensor, H: int, W: int) -> Tensor:
        """The inverse of fit, for a map of H x W tokens."""
        if self.pad == (0, 0):
            return x
        (dy, dx) = self.shift
        if not self.roll_first:
            return x[:, :H, :W]
        return torch.roll(torch.roll(x, (-dy, -dx), (1, 2))[:, :H, :W], (dy, dx), (1, 2))


class WindowedBlock(nn.Module):
    """What blocks with shifted windows share: the geometry, with timm's attributes and methods.

    window_clamp says what a map smaller than the window does. "axis" (timm): each axis takes the
    window and shift of the size the model was built for. "min" (Microsoft, Hugging Face): both axes
    take the smaller side, and a map of one window is not shifted. "pad" (torchvision): the window
    stays, and an axis of one padded window is not shifted. always_partition: always window and
    shift as given. pad_mode: "pad_roll" or "timm", see Windows.
    """

    def _set_geometry(
        self, input_resolution, window_size, shift_size, always_partition, window_clamp, pad_mode
    ) -> None:
        self.input_resolution = tuple(input_resolution)
        self.target_shift_size = shift_size
        self.always_partition = always_partition
        self.window_clamp, self.pad_mode = window_clamp, pad_mode
        self._set_window(window_size, shift_size)

    def _set_window(self, window: Pair, shift: Pair) -> None:
        size = self.input_resolution
        if not self.always_partition and self.window_clamp != "pad":
            limits = size if self.window_clamp == "axis" else (min(size),) * 2
            whole = [limit <= w for limit, w in zip(limits, window, strict=True)]
            window = tuple(min(limit, w) for limit, w in zip(limits, window, strict=True))
            shift = tuple(0 if one else s for one, s in zip(whole, shift, strict=True))
        self.window_size, self.shift_size = window, shift
        self.window_area = window[0] * window[1]

    def set_input_size(
        self, feat_size: Pair, window_size: Pair, always_partition: bool | None = None
    ) -> None:
        """Another map and window; the position biases are fitted to it."""
        self.input_resolution = tuple(feat_size)
        if always_partition is not None:
            self.always_partition = always_partition
        half = tuple(w // 2 for w in window_size)
        self._set_window(tuple(window_size), half if any(self.target_shift_size) else (0, 0))
        self.attn.set_window_size(self.window_size)

    def windows(self, H: int, W: int) -> Windows:
        """The windows of a map of H x W tokens."""
        (Wh, Ww), shift = self.window_size, self.shift_size
        pad = (-H % Wh, -W % Ww)
        if not self.always_partition and any(self.target_shift_size):
            if self.window_clamp == "min":
                shift = (0, 0) if min(H, W) <= Wh else (Wh // 2, Ww // 2)
            elif self.window_clamp == "pad":
                shift = (0 if Wh >= H else shift[0], 0 if Ww >= W else shift[1])
        roll_first = self.pad_mode == "timm" and any(pad) and any(shift)
        return Windows((Wh, Ww), shift, pad, roll_first)
