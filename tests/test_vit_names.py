"""timm's models by name, made small where the name promises nothing: depth, heads, image size."""

import copy
import re

import pytest
import torch
from timm_stub import timm
from vit_pairs import logits_and_grads, needs_timm, randomised, relative_errors

from vitkernels import FusedViT, use_backend
from vitkernels.testing import cases

pytestmark = pytest.mark.skipif(**needs_timm)

# name: channels of a head, which are kept, as are pooling, norms, tokens, activation, MLP ratio
NAMES = {
    "vit_tiny_patch16_224": 64,
    "vit_small_patch16_224": 64,
    "vit_small_patch32_384": 64,
    "vit_small_patch8_224": 64,
    "vit_base_patch16_224": 64,
    "vit_base_patch16_224_miil": 64,
    "vit_large_patch14_224": 64,
    "vit_huge_patch14_224": 80,
    "vit_giant_patch14_224": 88,
    "vit_gigantic_patch14_224": 104,
    "vit_base_patch16_gap_224": 48,
    "vit_medium_patch16_gap_240": 64,
    "vit_huge_patch16_gap_448": 80,
    "vit_base_patch32_clip_224": 64,
    "vit_base_patch16_clip_quickgelu_224": 64,
    "vit_huge_patch14_clip_quickgelu_378": 80,
    "vit_gigantic_patch14_clip_224": 104,
    "vit_xsmall_patch16_clip_224": 64,
    "vit_base_patch16_plus_240": 64,
    "vit_base_patch16_rpn_224": 64,
    "eva_large_patch14_196": 64,
    "flexivit_small": 64,
    "vit_small_patch14_dinov2": 64,
    "vit_base_patch14_reg4_dinov2": 64,
    "vit_base_patch14_reg1_tipsv2": 64,
    "vit_so400m_patch14_reg1_tipsv2": 72,
    "vit_giant_patch14_dinov2": 64,
    "vit_giant_patch14_reg1_tipsv2": 64,
    "vit_base_patch16_siglip_gap_224": 64,
    "vit_base_patch32_siglip_gap_256": 64,
    "vit_so400m_patch14_siglip_gap_378": 72,
    "vit_so400m_patch16_siglip_gap_256": 72,
    "vit_giantopt_patch16_siglip_gap_256": 96,
    "vit_wee_patch16_reg1_gap_256": 64,
    "vit_little_patch16_reg4_gap_256": 64,
    "vit_mediumd_patch16_reg4_gap_256": 64,
    "vit_betwixt_patch16_reg1_gap_256": 64,
    "vit_so150m_patch16_reg4_gap_256": 64,
    "vit_so150m2_patch16_reg1_gap_256": 64,
    "vit_base_patch16_reg4_gap_256": 64,
    "vit_base_patch16_radio_v3": 64,
    "beit3_base_patch16_224": 64,
    "test_vit": 32,
    "test_vit2": 32,
    "deit_tiny_patch16_224": 64,
    "deit3_small_patch16_224": 64,
    "deit3_huge_patch14_224": 80,
}
ODD = {
    "vit_small_patch16_224": (3, 5),
    "vit_small_patch14_dinov2": (5, 2),
    "flexivit_small": (1, 7),
}
GRAY = ("vit_small_patch8_224", "deit3_small_patch16_224", "vit_little_patch16_reg4_gap_256")


def small(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """timm's model of this name with 2 blocks of 2 heads, and images for it."""
    match = re.search(r"patch(\d+)", name)
    size = int(match[1]) if match else 16
    image = tuple(size * n for n in ODD.get(name, (3, 3)))
    in_chans = 1 if name in GRAY else 3
    model = timm.create_model(
        name, depth=2, num_heads=2, embed_dim=2 * NAMES[name], num_classes=10, img_size=image,
        in_chans=in_chans,
    )  # fmt: skip
    return randomised(model.eval()), torch.randn(2, in_chans, *image)


@pytest.mark.parametrize("name", NAMES)
def test_parity_with_timm(name):
    theirs, x = small(name)
    ours = FusedViT.from_timm(theirs)
    base = logits_and_grads(theirs, x)
    got = logits_and_grads(ours, x)
    truth = logits_and_grads(copy.deepcopy(theirs).double(), x.double())
    with use_backend("reference"):
        exact = logits_and_grads(ours.double(), x.double())
    assert got.keys() == exact.keys() == truth.keys()
    errors = relative_errors(exact, truth)
    assert max(errors.values()) < 1e-9, sorted(errors.items(), key=lambda e: -e[1])[:3]
    base, errors = relative_errors(base, truth), relative_errors(got, truth)
    for key, error in errors.items():
        assert error <= max(2 * base[key], 1e-6), f"{key}: ours {error:.3g}, timm's {base[key]:.3g}"
    cases.record("FusedViT", "reference", torch.float64, name)
    cases.record("FusedViT", "auto", torch.float32, name)


REFUSED = {
    "vit_base_patch16_siglip_224": "attention pooling",
    "vit_base_patch16_xp_224": "the block ParallelScalingBlock",
    "vit_small_patch16_18x2_224": "the block ParallelThingsBlock",
    "vit_dwee_patch16_reg1_gap_256": "the attention DiffAttention",
    "aimv2_large_patch14_224": "the MLP SwiGLU",
    "test_vit4": "the norm RmsNorm",
    "deit_tiny_distilled_patch16_224": "the model VisionTransformerDistilled",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name):
    model = timm.create_model(name, depth=1)
    with pytest.raises(ValueError, match=f"^from_timm: {REFUSED[name]}.*not supported") as error:
        FusedViT.from_timm(model)
    assert "\n" not in str(error.value)


def test_normalisation_comes_with_the_model():
    theirs = timm.create_model("vit_tiny_patch16_224", depth=1)
    assert FusedViT.from_timm(theirs).patch_embed.mean.tolist() == [0.5] * 3
    dinov2 = timm.create_model("vit_small_patch14_dinov2", depth=1, img_size=28)
    ours = FusedViT.from_timm(dinov2).patch_embed
    assert torch.allclose(ours.mean, torch.tensor(dinov2.pretrained_cfg["mean"]))
    assert torch.allclose(ours.std, torch.tensor(dinov2.pretrained_cfg["std"]))
    theirs, ours = dinov2, FusedViT.from_timm(dinov2)
    resolve = timm.data.resolve_data_config
    assert resolve(model=ours) == resolve(model=theirs)
    gray = timm.create_model("vit_small_patch14_dinov2", depth=1, img_size=28, in_chans=1)
    assert FusedViT.from_timm(gray).patch_embed.mean.tolist() == pytest.approx([0.449])
