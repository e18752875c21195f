"""Small Swin models of every source, and their state dicts in every layout people have."""

import torch
from timm_stub import timm
from torch import nn
from vit_pairs import randomised

try:  # after timm_stub: both import torchvision
    import transformers
except ImportError:
    transformers = None

SIZES = {"embed_dim": 12, "depths": (2, 2, 2), "num_heads": (1, 2, 3)}


def timm_swin(version=1, **more) -> nn.Module:
    """timm's, evaluating: window 4 at 64 pixels, whose last map is one window."""
    from timm.models import swin_transformer, swin_transformer_v2

    cls = (swin_transformer.SwinTransformer, swin_transformer_v2.SwinTransformerV2)[version - 1]
    settings = {"img_size": 64, "window_size": 4, "num_classes": 7, **SIZES, **more}
    return randomised(cls(**settings).eval())


def huggingface_swin(version=1, kind="ForImageClassification", **more) -> nn.Module:
    prefix = f"Swin{'v2' * (version == 2)}"
    settings = {"image_size": 64, "window_size": 4, "num_labels": 7, **SIZES, **more}
    config = getattr(transformers, f"{prefix}Config")(**settings)
    return randomised(getattr(transformers, prefix + kind)(config).eval())


def torchvision_swin(version=1, **more) -> nn.Module:
    from torchvision.models import swin_transformer as tv

    settings = {"patch_size": [4, 4], "window_size": [4, 4], "num_classes": 7, **SIZES, **more}
    if version == 2:
        settings |= {"block": tv.SwinTransformerBlockV2, "downsample_layer": tv.PatchMergingV2}
    return randomised(tv.SwinTransformer(**settings).eval())


# --- layouts of timm's weights ------------------------------------------------------------------


def microsoft_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """timm's weights under Microsoft's names, with the buffers that its files have."""
    state = {}
    for key, tensor in model.state_dict().items():
        part = key.split(".")
        if part[0] == "layers" and part[2] == "downsample":
            key = ".".join(["layers", str(int(part[1]) - 1), *part[2:]])
        state[key.replace("head.fc.", "head.")] = tensor
    for name, module in model.named_modules():
        for buffer in ("relative_position_index", "relative_coords_table", "attn_mask"):
            if getattr(module, buffer, None) is not None:
                state[f"{name}.{buffer}"] = getattr(module, buffer)
    return state


def openmmlab_state(model: nn.Module, version=1, prefix="backbone.") -> dict[str, torch.Tensor]:
    """timm's weights under mmpretrain's names, in the channel order of torch.nn.Unfold."""
    state, last = {}, len(model.layers) - 1
    for key, tensor in model.state_dict().items():
        if ".downsample." in key:
            if "reduction" in key or version == 1:
                tensor = unfold_order(tensor)
            if version == 1:
                stage = int(key.split(".")[1])
                key = key.replace(f"layers.{stage}.", f"layers.{stage - 1}.")
        for ours, theirs in (
            ("layers.", "stages."), (".attn.", ".attn.w_msa."), (".mlp.fc1.", ".ffn.layers.0.0."),
            (".mlp.fc2.", ".ffn.layers.1."), ("patch_embed.proj.", "patch_embed.projection."),
        ):  # fmt: skip
            key = key.replace(ours, theirs)
        if key.startswith("norm."):
            key = key.replace("norm.", f"norm{last}.")
        state[key if key.startswith("head.") else prefix + key] = tensor
    return state


def unfold_order(tensor: torch.Tensor) -> torch.Tensor:
    """(..., 4*C), pixels (0,0), (1,0), (0,1), (1,1) -> (..., C*2*2): by marking every channel."""
    channels = tensor.shape[-1] // 4
    marked = torch.arange(4 * channels, dtype=torch.float64).reshape(4, channels)
    image = torch.empty(1, channels, 2, 2, dtype=torch.float64)
    for at, (row, column) in enumerate(((0, 0), (1, 0), (0, 1), (1, 1))):
        image[0, :, row, column] = marked[at]
    return tensor[..., torch.nn.functional.unfold(image, 2, stride=2)[0, :, 0].long()]


class Plain(nn.Module):
    """transformers' model with a Tensor for output: logits, pooled features, or the last map."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        out = self.model(x)
        for name in ("logits", "pooler_output"):
            if getattr(out, name, None) is not None:
                return getattr(out, name)
        return out.feature_maps[-1].mean((2, 3))


needs_timm = {"condition": timm is None, "reason": "timm is not installed"}
needs_transformers = {
    "condition": transformers is None or timm is None,
    "reason": "transformers is not installed",
}
