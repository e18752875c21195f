"""FusedHybridViT gives timm's numbers: logits and every gradient, in evaluation and training."""

import pytest
import torch
from hybrid_pairs import CONFIGS, images, pair, timm_backbone, timm_hybrid
from model_checks import (
    check_bf16,
    check_draws,
    check_float64,
    check_fp32,
    check_loss_curve,
    check_source_left_alone,
)
from vit_pairs import logits_and_grads, needs_timm, same

from vitkernels import FusedHybridViT
from vitkernels.nn import HybridEmbed, ResNetStem, ResNetV2
from vitkernels.testing import cases

pytestmark = pytest.mark.skipif(**needs_timm)


@pytest.mark.parametrize("name", CONFIGS)
def test_float64_reference_equals_timm(name):
    theirs, ours = pair(name)
    assert isinstance(ours.patch_embed.backbone, (ResNetStem, ResNetV2))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    check_float64(theirs, ours, images(name))
    cases.record("FusedHybridViT", "reference", torch.float64, name)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_fp32_error_is_that_of_timm(name, backend):
    check_fp32(*pair(name), images(name), backend)
    cases.record("FusedHybridViT", backend, torch.float32, name)


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
@pytest.mark.parametrize("name", ["r", "r8"])
def test_bf16_error_is_that_of_timm(name, how):
    check_bf16(*pair(name), images(name, batch=4), how)
    cases.record("FusedHybridViT", "auto", torch.bfloat16, name, how)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_mode_draws_as_timm_does(checkpointing):
    settings = {"drop_path_rate": 0.4, "proj_drop_rate": 0.2, "pos_drop_rate": 0.1}
    theirs, ours = (model.train() for model in pair(**settings))
    for model in (theirs, ours):
        model.set_grad_checkpointing(checkpointing)
    check_draws(theirs, ours, images(batch=6))
    assert ours.patch_embed.backbone.stages[0].grad_checkpointing == checkpointing


def test_drop_path_of_the_backbone():
    backbone = timm_backbone((2, 2), drop_path_rate=0.8)
    theirs, ours = (model.train() for model in pair("one_stage", backbone=backbone, patch_size=1))
    rates = [block.drop_path.drop_prob for stage in ours.patch_embed.backbone.stages
             for block in stage.blocks]  # fmt: skip
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.8)
    check_draws(theirs, ours, images("one_stage", batch=6))


@pytest.mark.parametrize("scheme", ["", "jax", "moco", "reset"])
@pytest.mark.parametrize("layers", [(), (2, 1)])
def test_initial_weights_are_those_of_timm(scheme, layers):
    from timm.layers import HybridEmbed as TimmHybridEmbed
    from timm.models.vision_transformer import VisionTransformer
    from timm.models.vision_transformer_hybrid import _resnetv2

    settings = {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 7}
    settings |= {"patch_size": 1, "weight_init": scheme}
    torch.manual_seed(5)
    embed_layer = lambda **more: TimmHybridEmbed(_resnetv2(layers), **more)  # noqa: E731
    theirs = VisionTransformer(embed_layer=embed_layer, **settings)
    torch.manual_seed(5)
    ours = FusedHybridViT(layers, **settings)
    if scheme == "reset":
        for model in (theirs, ours):
            torch.manual_seed(6)
            model.init_weights()
    expected, got = theirs.state_dict(), ours.state_dict()
    assert list(got) == list(expected)
    assert not [key for key in got if not torch.equal(got[key], expected[key])]


@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "vit_base_resnet50_384"])
def test_from_timm_by_name(name):
    small = {"num_classes": 5, "img_size": 64, "depth": 1}
    ours = FusedHybridViT.from_timm(name, **small)
    other = FusedHybridViT.named(name, **small)
    other.load_state_dict(ours.to_timm_state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 64)
    same({"y": other.eval()(x)}, {"y": ours.eval()(x)}, 0.0)


NAMES = [
    "vit_tiny_r_s16_p8_224", "vit_tiny_r_s16_p8_384", "vit_small_r26_s32_224",
    "vit_small_r26_s32_384", "vit_base_r26_s32_224", "vit_base_r50_s16_224",
    "vit_base_r50_s16_384", "vit_large_r50_s32_224", "vit_large_r50_s32_384",
    "vit_base_resnet50_384",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_stand_for_timm_s_sizes(name):
    import timm

    ours = FusedHybridViT.named(name, device="meta", depth=2, weight_init="skip")
    expected = timm.create_model(name, depth=2, num_classes=1000).state_dict()
    got = ours.state_dict()
    assert list(got) == list(expected)
    assert [t.shape for t in got.values()] == [t.shape for t in expected.values()]


def test_from_timm_copies_and_leaves_the_source_alone():
    theirs = timm_hybrid("r8", drop_path_rate=0.2).bfloat16().train()
    theirs.patch_embed.backbone.stem.conv.weight.requires_grad_(False)
    theirs.patch_embed.backbone.stages[1].eval()
    theirs.set_grad_checkpointing()
    ours = FusedHybridViT.from_timm(theirs)
    stages = ours.patch_embed.backbone.stages
    assert ours.training and stages[0].training and not stages[1].blocks[0].conv1.training
    assert ours.grad_checkpointing and all(stage.grad_checkpointing for stage in stages)
    check_source_left_alone(theirs, ours, torch.bfloat16)


def test_what_timm_can_change_in_its_backbone_is_seen():
    """What our ResNet does not compute stays timm's, and gives the same numbers."""

    def dilated(backbone):
        conv = backbone.stages[0].blocks[0].conv2
        conv.dilation, conv.padding = (2, 2), (2, 2)

    def more_groups(backbone):
        backbone.stem.norm.num_groups = 64

    def another_pool(backbone):
        backbone.stem.pool = torch.nn.AvgPool2d(2)

    x = images()
    for change in (dilated, more_groups, another_pool):
        backbone = timm_backbone((2, 1, 1))
        change(backbone)
        theirs, ours = pair(backbone=backbone)
        assert type(ours.patch_embed.backbone) is type(backbone)
        same(logits_and_grads(ours, x), logits_and_grads(theirs, x))
    theirs = timm_hybrid()
    theirs.patch_embed.backbone.stages[0].blocks[0].conv1.eps = 0.5  # an eps is copied
    ours = FusedHybridViT.from_timm(theirs)
    assert isinstance(ours.patch_embed.backbone, ResNetV2)
    same(logits_and_grads(ours, x), logits_and_grads(theirs, x))


def test_a_hybrid_is_no_plain_vit():
    from vit_pairs import timm_vit

    from vitkernels import FusedViT

    with pytest.raises(ValueError, match="patch_embed HybridEmbed is not supported by FusedViT"):
        FusedViT.from_timm(timm_hybrid())
    with pytest.raises(ValueError, match="patch_embed PatchEmbed is not supported by FusedHybridV"):
        FusedHybridViT.from_timm(timm_vit())
    assert isinstance(FusedHybridViT.named(NAMES[0], depth=1).patch_embed, HybridEmbed)


def test_fifty_training_steps_follow_the_same_loss_curve():
    models = pair("one_stage", drop_path_rate=0.1)
    check_loss_curve(*models, images("one_stage", batch=8), 50, lr=5e-4)
