"""A stage of Swin: patch merging, then blocks of which every second shifts its windows."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .patch_merging import PatchMerging, PatchMergingV2
from .pending import Pending, add, chainable
from .swin_block import SwinBlock
from .swin_v2_block import SwinV2Block
from .windows import Pair


class SwinStage(nn.Module):
    """(B, H, W, dim) -> (B, ceil(H / 2), ceil(W / 2), out_dim); without downsample the same size.

    block: what each block is made with, beside its own shift and DropPath. v1's blocks hand each
    other the residual add still to be done.
    """

    def __init__(
        self,
        version: int,
        dim: int,
        out_dim: int,
        input_resolution: Pair,
        window_size: Pair,
        drop_path: list[float],
        downsample: bool,
        norm_layer,
        block: dict,
        device=None,
        dtype=None,
    ):
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.dim, self.depth = dim, len(drop_path)
        self.grad_checkpointing = False
        merging, block_class = (PatchMerging, SwinBlock)
        if version == 2:
            merging, block_class = (PatchMergingV2, SwinV2Block)
        self.downsample = (
            merging(dim, out_dim, norm_layer, **where) if downsample else nn.Identity()
        )
        self._set_resolution(input_resolution)
        half = tuple(w // 2 for w in window_size)
        self.blocks = nn.Sequential(
            *[
                block_class(
                    out_dim,
                    self.output_resolution,
                    window_size=window_size,
                    shift_size=half if i % 2 else (0, 0),
                    drop_path=rate,
                    norm_layer=norm_layer,
                    **block,
                    **where,
                )
                for i, rate in enumerate(drop_path)
            ]
        )

    def _set_resolution(self, input_resolution: Pair) -> None:
        merges = not isinstance(self.downsample, nn.Identity)
        self.input_resolution = tuple(input_resolution)
        self.output_resolution = tuple((n + 1) // 2 if merges else n for n in input_resolution)

    def set_input_size(
        self, feat_size: Pair, window_size: Pair, always_partition: bool | None = None
    ) -> None:
        self._set_resolution(feat_size)
        for block in self.blocks:
            block.set_input_size(self.output_resolution, window_size, always_partition)

    def forward(self, x: Tensor) -> Tensor:
        return add(self.pending(x))

    def pending(self, x: Tensor) -> Pending:
        """The output, its last residual add perhaps still to be done."""
        x = self.downsample(x)
        if self.grad_checkpointing:  # Tensors between blocks: a Pending would save two
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return Pending(x)
        if not chainable(self.blocks, SwinBlock):
            return Pending(self.blocks(x))
        pending = Pending(x)
        for block in self.blocks:
            pending = block(pending)
        return pending
