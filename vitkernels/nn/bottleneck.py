"""The bottleneck block of BiT's ResNet in front of a hybrid ViT; timm's names."""

from __future__ import annotations

import functools

from torch import Tensor, nn

from .drop_path import DropPath
from .group_norm import GroupNormAct
from .std_conv import StdConv2d

std_conv = functools.partial(StdConv2d, eps=1e-8)  # of JAX's hybrid; the layer's default is timm's


class DownsampleConv(nn.Module):
    """The shortcut where size or width change: 1 x 1 convolution and norm."""

    def __init__(
        self, in_chs: int, out_chs: int, stride: int, padding: str, device=None, dtype=None
    ):
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.conv = std_conv(in_chs, out_chs, 1, stride, padding, **where)
        self.norm = GroupNormAct(out_chs, apply_act=False, **where)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Bottleneck(nn.Module):
    """act(shortcut(x) + norm3(conv3(relu norm2(conv2(relu norm1(conv1 x)))))), conv2 strided.

    He et al. 2016, after the activation, with standardised weights and GroupNorm (Kolesnikov et al.
    2020). A quarter of the output's channels in between.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        stride: int = 1,
        downsample: bool = False,
        padding: str = "same",
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        where = {"device": device, "dtype": dtype}
        mid_chs = out_chs // 4
        shortcut = DownsampleConv(in_chs, out_chs, stride, padding, **where) if downsample else None
        self.downsample = shortcut
        self.conv1 = std_conv(in_chs, mid_chs, 1, padding=padding, **where)
        self.norm1 = GroupNormAct(mid_chs, **where)
        self.conv2 = std_conv(mid_chs, mid_chs, 3, stride, padding, **where)
        self.norm2 = GroupNormAct(mid_chs, **where)
        self.conv3 = std_conv(mid_chs, out_chs, 1, padding=padding, **where)
        self.norm3 = GroupNormAct(out_chs, apply_act=False, **where)
        self.drop_path = DropPath(drop_path)
        self.act3 = nn.ReLU(inplace=True)

    def zero_init_last(self) -> None:
        """The block begins as its shortcut."""
        nn.init.zeros_(self.norm3.weight)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.norm1(self.conv1(x))
        x = self.norm2(self.conv2(x))
        x = self.drop_path(self.norm3(self.conv3(x)))
        return self.act3(x + shortcut)
