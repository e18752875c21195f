"""FusedHybridViT gives timm's numbers: logits and every gradient, in evaluation and training."""

import copy

import pytest
import torch
from hybrid_pairs import CONFIGS, images, pair, timm_hybrid
from vit_pairs import logits_and_grads, needs_timm, relative_errors, same

from vitkernels import FusedHybridViT, use_backend
from vitkernels.nn import HybridEmbed, ResNetStem, ResNetV2
from vitkernels.testing import cases

pytestmark = pytest.mark.skipif(**needs_timm)


@pytest.mark.parametrize("name", CONFIGS)
def test_float64_reference_equals_timm(name):
    theirs, ours = (model.double() for model in pair(name))
    assert isinstance(ours.patch_embed.backbone, (ResNetStem, ResNetV2))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = images(name).double()
    truth = logits_and_grads(theirs, x)
    with use_backend("reference"):
        got = logits_and_grads(ours, x)
    same(got, truth, 1e-9)
    cases.record("FusedHybridViT", "reference", torch.float64, name)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_fp32_error_is_that_of_timm(name, backend):
    theirs, ours = pair(name)
    x = images(name)
    truth = logits_and_grads(copy.deepcopy(theirs).double(), x.double())
    base = relative_errors(logits_and_grads(theirs, x), truth)
    with use_backend(backend):
        errors = relative_errors(logits_and_grads(ours, x), truth)
    for key, error in errors.items():
        assert error <= max(2 * base[key], 1e-6), f"{key}: ours {error:.3g}, timm's {base[key]:.3g}"
    cases.record("FusedHybridViT", backend, torch.float32, name)


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
@pytest.mark.parametrize("name", ["r", "r8"])
def test_bf16_error_is_that_of_timm(name, how):
    theirs, ours = pair(name)
    x = images(name, batch=4)
    truth = logits_and_grads(copy.deepcopy(theirs).double(), x.double())
    if how == "bfloat16":
        theirs, ours, x = theirs.bfloat16(), ours.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        got = logits_and_grads(ours, x)
        base = logits_and_grads(theirs, x)
    assert got["logits"].dtype == base["logits"].dtype
    errors, base = relative_errors(got, truth), relative_errors(base, truth)
    ratios = torch.tensor([errors[key] / base[key] for key in errors if base[key] > 1e-4])
    assert ratios.median() <= 1.1
    assert ratios.max() <= 4, max(errors, key=lambda key: errors[key] / base[key])
    cases.record("FusedHybridViT", "auto", torch.bfloat16, name, how)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_mode_draws_as_timm_does(checkpointing):
    settings = {"drop_path_rate": 0.4, "proj_drop_rate": 0.2, "pos_drop_rate": 0.1}
    theirs, ours = (model.train() for model in pair(**settings))
    x, results = images(batch=6), []
    for model in (theirs, ours):
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(11)
        results.append(logits_and_grads(model, x))
    assert ours.patch_embed.backbone.stages[0].grad_checkpointing == checkpointing
    same(results[1], results[0], 5e-5)


def test_drop_path_of_the_backbone():
    from hybrid_pairs import timm_backbone

    backbone = timm_backbone((2, 2), drop_path_rate=0.8)
    theirs, ours = (model.train() for model in pair("one_stage", backbone=backbone, patch_size=1))
    rates = [block.drop_path.drop_prob for stage in ours.patch_embed.backbone.stages
             for block in stage.blocks]  # fmt: skip
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.8)
    x, results = images("one_stage", batch=6), []
    for model in (theirs, ours):
        torch.manual_seed(11)
        results.append(logits_and_grads(model, x))
    same(results[1], results[0], 5e-5)


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
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    ours = FusedHybridViT.from_timm(theirs)
    stages = ours.patch_embed.backbone.stages
    assert ours.training and stages[0].training and not stages[1].blocks[0].conv1.training
    assert ours.grad_checkpointing and all(stage.grad_checkpointing for stage in stages)
    for (name, mine), (_, other) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert torch.equal(mine, other) and mine.data_ptr() != other.data_ptr(), name
        assert mine.dtype == torch.bfloat16 and mine.requires_grad == other.requires_grad
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], t) for name, t in theirs.state_dict().items())


def test_what_timm_can_change_in_its_backbone_is_seen():
    """What our ResNet does not compute stays timm's, and gives the same numbers."""

    def dilated(backbone):
        conv = backbone.stages[0].blocks[0].conv2
        conv.dilation, conv.padding = (2, 2), (2, 2)

    def more_groups(backbone):
        backbone.stem.norm.num_groups = 64

    def another_pool(backbone):
        backbone.stem.pool = torch.nn.AvgPool2d(2)

    from hybrid_pairs import timm_backbone

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
    theirs, ours = (model.train() for model in pair("one_stage", drop_path_rate=0.1))
    x, target = images("one_stage", batch=8), torch.randint(0, 10, (8,))
    curves = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
        losses = []
        for _ in range(50):
            loss = torch.nn.functional.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-1] < 0.5 * curves[0][0]
    assert (curves[0] - curves[1]).abs().max() < 1e-3
