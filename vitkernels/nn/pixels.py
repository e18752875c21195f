"""Normalisation of uint8 images inside the module that embeds them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PixelNormalization(nn.Module):
    """Holds mean and std of each channel, in units of images in [0, 1], beside the parameters."""

    def _keep_normalization(self, mean, std, in_chans: int) -> None:
        self._normalization = {
            "mean": per_channel(type(self).__name__, "mean", mean, in_chans),
            "std": per_channel(type(self).__name__, "std", std, in_chans),
        }
        self._renew_normalization()
        self.register_load_state_dict_post_hook(PixelNormalization._renew_normalization)

    def set_normalization(self, mean=None, std=None) -> None:
        """Other mean and std for uint8 images: a float, or one for each channel."""
        in_chans = len(self._normalization["mean"])
        for name, value in (("mean", mean), ("std", std)):
            if value is not None:
                values = per_channel(type(self).__name__, name, value, in_chans)
                self._normalization[name] = values
        self._renew_normalization()

    def _renew_normalization(self, *_) -> None:
        """mean and std as (in_chans,) fp32 buffers beside the parameters, whatever their dtype."""
        for name, values in self._normalization.items():
            tensor = torch.tensor(values, dtype=torch.float32, device=self._parameter().device)
            self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn, recurse: bool = True) -> PixelNormalization:
        super()._apply(fn, recurse)
        self._renew_normalization()  # 16 bits of a mean are too few; and never from a meta tensor
        return self

    def _normalized(self, x: Tensor) -> Tensor:
        """uint8 pixels in the parameters' dtype; float images as they are."""
        if x.dtype != torch.uint8:
            return x
        dtype = self._parameter().dtype
        x = x.to(torch.promote_types(dtype, torch.float32)) / 255
        return ((x - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)).to(dtype)

    def _parameter(self) -> Tensor:
        return next(self.parameters())


def per_channel(owner: str, name: str, values, in_chans: int) -> tuple[float, ...]:
    values = (values,) * in_chans if isinstance(values, (int, float)) else tuple(values)
    if len(values) != in_chans:
        raise ValueError(f"{owner}: {name} must be a float or {in_chans} floats, got {values}")
    if name == "std" and not all(value > 0 for value in values):
        raise ValueError(f"{owner}: std must be above 0, got {values}")
    return tuple(float(value) for value in values)
