"""FusedDeiT: a Vision Transformer that learns from a teacher through a token of its own.

    images -> patches -> + class and distillation token, position -> blocks -> norm -> two heads

Constructor arguments, attribute names, methods and state_dict keys are those of timm's
VisionTransformerDistilled, and of its VisionTransformer where distilled=False (DeiT without
distillation, DeiT-III).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .deit_names import IMAGENET
from .init import trunc_normal_
from .loaders import DeiTLoaders
from .vit import FusedViT


class FusedDeiT(DeiTLoaders, FusedViT):
    """DeiT on fused kernels. Touvron et al. 2021 (distillation token), 2022 (DeiT-III).

    The logits are the mean of the two heads', in training too, unless set_distilled_training(True)
    was called: then a training forward returns the pair that nn.DistillationLoss takes.

    Args: as FusedViT's, and
        distilled: with the distillation token and its head. Without, it is a FusedViT.
        dist_head: False leaves the token without a head (transformers' DeiTForImageClassification):
        the logits are the class head's.
        mean, std: ImageNet's, unless given.
    """

    _head_rows = 1

    def __init__(self, *args, distilled: bool = True, dist_head: bool = True, **kwargs):
        for name, flag in (("distilled", distilled), ("dist_head", dist_head)):
            if not isinstance(flag, bool):
                raise TypeError(f"FusedDeiT: {name} must be True or False, got {flag!r}")
        weight_init = kwargs.pop("weight_init", "")
        in_chans = args[2] if len(args) > 2 else kwargs.get("in_chans", 3)
        super().__init__(*args, **{**_imagenet(in_chans), **kwargs}, weight_init="skip")
        where = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        self.distilled, self.dist_head = distilled, distilled and dist_head
        self.distilled_training = False
        self.dist_token = self.head_dist = None
        if distilled:
            self._check_distilled()
            self.num_prefix_tokens = self._head_rows = 2
            self.patch_drop.num_prefix_tokens = 2
            self.dist_token = nn.Parameter(torch.empty(1, 1, self.embed_dim, **where))
            if self.pos_embed is not None:
                tokens = 0 if self.no_embed_class else 2
                positions = (1, tokens + self.patch_embed.num_patches, self.embed_dim)
                self.pos_embed = nn.Parameter(torch.empty(positions, **where))
        if self.dist_head:
            self.head_dist = self._make_head(**where)
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def _check_distilled(self) -> None:
        if self.global_pool != "token" or not self.has_class_token:
            raise ValueError(
                "FusedDeiT: global_pool must be 'token' (the heads read the class and the"
                f" distillation token), got {self.global_pool!r}"
            )
        if self.num_reg_tokens:
            raise ValueError(
                "FusedDeiT: reg_tokens must be 0 beside a distillation token, got"
                f" {self.num_reg_tokens}"
            )

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        if self.dist_token is not None:
            trunc_normal_(self.dist_token, std=0.02)
        super().init_weights(mode, needs_reset)

    # --- forward ----------------------------------------------------------------------------------

    @classmethod
    def _owner(cls) -> type:
        return FusedDeiT

    def _prefix(self) -> list[nn.Parameter]:
        tokens = (self.cls_token, self.dist_token, self.reg_token)
        return [token for token in tokens if token is not None]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Logits (B, classes), or in distilled training those of each head; pre_logits: (B, C)."""
        if not self.distilled:
            return super().forward_head(x, pre_logits)
        of_class, of_distillation = self.head_drop(x[:, 0]), self.head_drop(x[:, 1])
        if pre_logits:
            return (of_class + of_distillation) / 2
        of_class = self.head(of_class)
        if self.head_dist is None:
            return of_class
        of_distillation = self.head_dist(of_distillation)
        if self.distilled_training and self.training:
            return of_class, of_distillation
        return (of_class + of_distillation) / 2

    # --- what training scripts ask of a timm model ------------------------------------------------

    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether a training forward returns the logits of both heads, as a pair."""
        if enable and not self.dist_head:
            raise ValueError(
                "set_distilled_training: the model must have a distillation head, got one without"
            )
        self.distilled_training = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        if not self.distilled:
            return super().group_matcher(coarse)
        return {
            "stem": r"^cls_token|pos_embed|patch_embed|dist_token",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def get_classifier(self) -> Any:
        """The head, or both."""
        return (self.head, self.head_dist) if self.dist_head else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for num_classes (0: none)."""
        if not self.distilled:
            return super().reset_classifier(num_classes, global_pool)
        if global_pool not in (None, "", "token"):
            raise ValueError(
                "reset_classifier: global_pool must be 'token' (the heads read the class and the"
                f" distillation token), got {global_pool!r}"
            )
        super().reset_classifier(num_classes)
        if self.dist_head:
            some = next(self.parameters())
            head = self._make_head(device=some.device, dtype=some.dtype)
            self.head_dist = head.train(self.training)
        return None


def _imagenet(in_chans: int) -> dict:
    """Mean and std of ImageNet's channels; of another number of them their averages, as timm."""
    if in_chans == 3:
        return IMAGENET
    return {name: sum(values) / len(values) for name, values in IMAGENET.items()}
