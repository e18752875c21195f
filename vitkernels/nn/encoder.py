"""A stack of encoder blocks: the encoder of the original Transformer."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from .._checks import fail, positive_int
from .encoder_block import EncoderBlock, norm_dtype
from .pending import Pending, add, add_norm, fusable
from .watched import global_hooks, hooked


class Encoder(nn.Module):
    """num_layers copies of a block, one after the other, and a last norm where one is given.

    Arguments and state_dict of torch.nn.TransformerEncoder; enable_nested_tensor and mask_check are
    taken and change nothing: padded positions are computed like the others.
    """

    def __init__(
        self,
        encoder_layer: EncoderBlock,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ):
        super().__init__()
        if not isinstance(encoder_layer, EncoderBlock):
            expected = "an EncoderBlock (of torch's layer: EncoderBlock.from_torch(layer))"
            fail("Encoder", "encoder_layer", expected, type(encoder_layer).__name__, TypeError)
        positive_int("Encoder", "num_layers", num_layers)
        self.layers = nn.ModuleList(copy.deepcopy(encoder_layer) for _ in range(num_layers))
        self.num_layers, self.norm = num_layers, norm

    @classmethod
    def from_torch(cls, encoder: nn.TransformerEncoder) -> Encoder:
        """With the settings, and copies of the parameters, of torch's encoder."""
        from .from_torch import encoder_from_torch

        return encoder_from_torch(cls, encoder)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        *,
        valid_lens: Tensor | None = None,
    ) -> Tensor:
        masks = (mask, src_key_padding_mask, bool(is_causal))
        x: Tensor | Pending = Pending(src) if self._chains() else src
        for layer in self.layers:
            x = layer(x, *masks, valid_lens=valid_lens)
        if not isinstance(x, Pending):
            return x if self.norm is None else self.norm(x)
        if self.norm is None:
            return add(x)
        if not fusable(self.norm):
            return self.norm(add(x))
        return add_norm(x, self.norm, norm_dtype(src))[0]

    def _chains(self) -> bool:
        """Whether a block may leave its last add to the norm of the next: a hook sees Tensors."""
        return not global_hooks() and all(
            type(layer) is EncoderBlock and layer.norm_first and not hooked(layer)
            for layer in self.layers
        )
