"""Where models come from: names, other libraries' models, and checkpoint files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from torch import Tensor, nn

from .deit_names import deit_settings
from .swin_names import swin_settings

# name: (embed_dim, depth, num_heads, mlp_ratio)
SIZES = {
    "tiny": (192, 12, 3, 4.0),
    "small": (384, 12, 6, 4.0),
    "base": (768, 12, 12, 4.0),
    "large": (1024, 24, 16, 4.0),
    "huge": (1280, 32, 16, 4.0),
    "giant": (1408, 40, 16, 48 / 11),
    "gigantic": (1664, 48, 16, 64 / 13),
}


class Loaders:
    """Class methods that make a model.

    Parameters are copied, the source is left untouched, and nothing is made from a checkpoint that
    does not fit: one sentence says what was expected and what came. From a model: dtype, device,
    training mode and requires_grad are kept. From a file: the file's dtypes, on the CPU,
    evaluating. **kwargs are constructor arguments that replace what the source says: another
    img_size, patch_size or in_chans resamples, another num_classes makes a fresh head; device and
    dtype move the result.
    """

    def to_timm_state_dict(self) -> dict[str, Tensor]:
        """The state_dict: its keys are timm's."""
        return self.state_dict()


class ViTLoaders(Loaders):
    """Class methods of FusedViT that make a model: see Loaders."""

    @classmethod
    def from_timm(cls, model: str | nn.Module, pretrained: bool = False, **kwargs):
        """From a timm VisionTransformer, or the name of one (**kwargs go to timm.create_model)."""
        from ..checkpoints.timm import vit_from_timm

        return vit_from_timm(cls, model, pretrained, **kwargs)

    @classmethod
    def from_huggingface(cls, source: str | os.PathLike | nn.Module, **kwargs):
        """From transformers' ViTModel, ViTForImageClassification or Dinov2Model (also with
        registers), or from a folder with their config.json and weights."""
        from ..checkpoints.huggingface import vit_from_huggingface

        return vit_from_huggingface(cls, source, **kwargs)

    @classmethod
    def from_torchvision(cls, model: nn.Module, **kwargs):
        """From torchvision's VisionTransformer (vit_b_16 and the others)."""
        from ..checkpoints.torchvision import vit_from_torchvision

        return vit_from_torchvision(cls, model, **kwargs)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **kwargs):
        """From a local .safetensors, .pth, .pt, .bin or .npz file, or a folder with config.json.

        The names in it tell whether timm, transformers, torchvision or JAX wrote it. What shapes
        do not tell is timm's usual: heads of 64 channels (the known giants apart), eps 1e-6 (1e-5
        with pre-norm, 1e-12 with transformers' names of ViT), erf GELU, norms before the branches;
        num_heads, norm_layer, act_layer and block_fn say otherwise.
        """
        from ..checkpoints.pretrained import vit_from_pretrained

        return vit_from_pretrained(cls, path, **kwargs)

    @classmethod
    def named(cls, name: str, **kwargs):
        """With fresh weights, by timm's name: `FusedViT.named("vit_small_patch16_224")`."""
        match = re.fullmatch(r"vit_([a-z0-9]+)_patch(\d+)_(\d+)", name)
        if match is None or match[1] not in SIZES:
            raise ValueError(
                "FusedViT.named: name must be vit_SIZE_patchP_PIXELS with SIZE one of "
                f"{', '.join(SIZES)}, got {name!r}"
            )
        keys = ("embed_dim", "depth", "num_heads", "mlp_ratio")
        size = dict(zip(keys, SIZES[match[1]], strict=True))
        return cls(**{"img_size": int(match[3]), "patch_size": int(match[2]), **size, **kwargs})


class DeiTLoaders(Loaders):
    """Class methods of FusedDeiT that make a model: see Loaders."""

    @classmethod
    def from_timm(cls, model: str | nn.Module, pretrained: bool = False, **kwargs):
        """From a timm VisionTransformerDistilled or VisionTransformer, or the name of one:
        deit_*, deit_*_distilled_*, deit3_* (**kwargs go to timm.create_model)."""
        from ..checkpoints.deit import deit_from_timm

        return deit_from_timm(cls, model, pretrained, **kwargs)

    @classmethod
    def from_huggingface(cls, source: str | os.PathLike | nn.Module, **kwargs):
        """From transformers' DeiTModel, DeiTForImageClassification (one head) or
        DeiTForImageClassificationWithTeacher (two), or from a folder with their config.json and
        weights."""
        from ..checkpoints.deit import deit_from_huggingface

        return deit_from_huggingface(cls, source, **kwargs)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **kwargs):
        """From a local .safetensors, .pth, .pt or .bin file, or a folder with config.json.

        The names in it tell whether timm, the original repository or transformers wrote it, and
        whether there is a distillation token. What shapes do not tell is the usual: heads of 64
        channels, eps 1e-6 (1e-12 with transformers' names), ImageNet's mean and std.
        """
        from ..checkpoints.deit import deit_from_pretrained

        return deit_from_pretrained(cls, path, **kwargs)

    @classmethod
    def named(cls, name: str, **kwargs):
        """With fresh weights, by timm's name: `FusedDeiT.named("deit_tiny_patch16_224")`."""
        return cls(**{**deit_settings(name), **kwargs})


class SwinLoaders(Loaders):
    """Class methods of FusedSwin that make a model: see Loaders.

    Off the window grid, at maps smaller than a window and at other image sizes sources differ:
    window_clamp, pad_mode, always_partition and strict_img_size are set to what the source does.
    """

    @classmethod
    def from_timm(cls, model: str | nn.Module, pretrained: bool = False, **kwargs):
        """From a timm SwinTransformer or SwinTransformerV2, or the name of one (**kwargs go to
        timm.create_model)."""
        from ..checkpoints.swin_timm import swin_from_timm

        return swin_from_timm(cls, model, pretrained, **kwargs)

    @classmethod
    def from_huggingface(cls, source: str | os.PathLike | nn.Module, **kwargs):
        """From transformers' SwinModel, SwinForImageClassification, SwinBackbone, Swinv2Model or
        Swinv2ForImageClassification, or from a folder with their config.json and weights."""
        from ..checkpoints.swin_huggingface import swin_from_huggingface

        return swin_from_huggingface(cls, source, **kwargs)

    @classmethod
    def from_torchvision(cls, model: nn.Module, **kwargs):
        """From torchvision's SwinTransformer (swin_t, swin_s, swin_b, swin_v2_t and the others)."""
        from ..checkpoints.swin_torchvision import swin_from_torchvision

        return swin_from_torchvision(cls, model, **kwargs)

    @classmethod
    def from_microsoft(cls, state_dict: Mapping, **kwargs):
        """From a state dict of Microsoft's Swin or Swin V2, also inside {"model": state_dict}."""
        from ..checkpoints.swin_microsoft import swin_from_microsoft

        return swin_from_microsoft(cls, state_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **kwargs):
        """From a local .safetensors, .pth, .pt or .bin file, or a folder with config.json.

        The names in it tell whether timm, Microsoft, transformers, torchvision or OpenMMLab wrote
        it. Windows come from the bias tables, of version 2 from stored coordinates (else name
        window_size and img_size); the image is the one whose last map is one window.
        """
        from ..checkpoints.swin_pretrained import swin_from_pretrained

        return swin_from_pretrained(cls, path, **kwargs)

    @classmethod
    def named(cls, name: str, **kwargs):
        """With fresh weights, by timm's name: `FusedSwin.named("swin_tiny_patch4_window7_224")`."""
        return cls(**{**swin_settings(name), **kwargs})
