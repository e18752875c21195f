"""FusedViT gives timm's numbers: logits and every gradient, in evaluation and in training mode."""

import pytest
import torch
from model_checks import (
    BF16,
    check_autocast_dtypes,
    check_bf16,
    check_draws,
    check_float64,
    check_fp32,
    check_loss_curve,
    check_source_left_alone,
)
from vit_pairs import CONFIGS, images, needs_timm, pair, relative_errors, timm_vit

from vitkernels import FusedViT
from vitkernels.testing import cases

pytestmark = pytest.mark.skipif(**needs_timm)


@pytest.mark.parametrize("name", CONFIGS)
def test_float64_reference_equals_timm(name):
    check_float64(*pair(name), images(name))
    cases.record("FusedViT", "reference", torch.float64, name)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_fp32_error_is_that_of_timm(name, backend):
    check_fp32(*pair(name), images(name), backend)
    cases.record("FusedViT", backend, torch.float32, name)


@pytest.mark.parametrize("name", ["class_token", "registers_layer_scale", "average_pool"])
@pytest.mark.parametrize("how", BF16)
def test_bf16_error_is_that_of_timm(name, how):
    check_bf16(*pair(name), images(name, batch=4), how)
    cases.record("FusedViT", "auto", torch.bfloat16, name, how)


RANDOM = {
    "drop_path": {"drop_path_rate": 0.4, "init_values": 0.5},
    "drop_path_everywhere": {"drop_path_rate": 0.9},
    "dropouts": {"drop_rate": 0.2, "pos_drop_rate": 0.1, "proj_drop_rate": 0.3},
    "no_positions": {"pos_embed": "none", "pos_drop_rate": 0.9, "proj_drop_rate": 0.1},  # no drop
    "patch_dropout": {"patch_drop_rate": 0.4, "reg_tokens": 2, "drop_path_rate": 0.2},
    "res_post_norm": {"block_fn": "ResPostBlock", "drop_path_rate": 0.4},
}


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_mode_draws_as_timm_does(name, checkpointing):
    models = [model.train() for model in pair(**RANDOM[name])]
    for model in models:
        model.set_grad_checkpointing(checkpointing)
    check_draws(*models, images(batch=6))


def test_autocast_dtypes_are_those_of_timm():
    check_autocast_dtypes(*pair("registers_layer_scale"), images())


@pytest.mark.parametrize("block_fn, mlp", [("Block", "Mlp"), ("ResPostBlock", "SwiGLUPacked")])
@pytest.mark.parametrize("scheme", ["", "jax", "jax_nlhb", "moco", "reset"])
def test_initial_weights_are_those_of_timm(scheme, block_fn, mlp):
    from timm.models import vision_transformer

    block_fn, models = getattr(vision_transformer, block_fn), []
    mlp_layer = getattr(vision_transformer, mlp)
    for cls in (vision_transformer.VisionTransformer, FusedViT):
        torch.manual_seed(5)
        model = cls(
            img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=7,
            reg_tokens=2, init_values=0.1, qk_norm=True, weight_init=scheme, fix_init=True,
            block_fn=block_fn, mlp_layer=mlp_layer,
        )  # fmt: skip
        if scheme == "reset":  # pos_embed comes first: what follows draws the same
            model.init_weights()
        models.append(model.state_dict())
    expected, got = models
    assert list(got) == list(expected)
    different = [key for key in got if not torch.equal(got[key], expected[key])]
    assert not different


@pytest.mark.parametrize("attn_mask", ["bool", "float", "causal"])
def test_attention_masks(attn_mask):
    theirs, ours = pair()
    x, N = images(), 17
    options = {
        "bool": {"attn_mask": torch.rand(N, N) > 0.3},
        "float": {"attn_mask": torch.randn(2, 1, N, N)},
        "causal": {"is_causal": True},
    }[attn_mask]
    if attn_mask == "bool":
        options["attn_mask"].fill_diagonal_(True)
    error = relative_errors({"y": ours(x, **options)}, {"y": theirs(x, **options)})["y"]
    assert error < 2e-6


def test_fifty_training_steps_follow_the_same_loss_curve():
    check_loss_curve(*pair(drop_path_rate=0.1, init_values=0.5), images(batch=8), 50)


# --- from_timm ------------------------------------------------------------------------------------


def test_from_timm_copies_and_leaves_the_source_alone():
    theirs = timm_vit("registers_layer_scale", drop_path_rate=0.2).bfloat16().train()
    theirs.cls_token.requires_grad_(False)
    theirs.blocks[1].eval()
    ours = FusedViT.from_timm(theirs)
    assert ours.training and not ours.blocks[1].attn.training and ours.blocks[2].training
    assert [b.drop_path2.drop_prob for b in ours.blocks] == pytest.approx([0.0, 0.1, 0.2])
    check_source_left_alone(theirs, ours, torch.bfloat16)


def test_from_timm_by_name_and_strict_loading():
    ours = FusedViT.from_timm("vit_tiny_patch16_224", num_classes=5, img_size=64)
    assert ours.head.out_features == 5 and ours.patch_embed.grid_size == (4, 4)
    other = FusedViT.named("vit_tiny_patch16_64", num_classes=5)
    other.load_state_dict(ours.to_timm_state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(other.eval()(x), ours.eval()(x))


@pytest.mark.parametrize(
    "make, sentence",
    [
        ({"global_pool": "map"}, "attention pooling"),
        ({"attn_layer": "diff", "embed_dim": 64, "num_heads": 4}, "DiffAttention"),
        ({"block_fn": "ParallelScalingBlock"}, "ParallelScalingBlock"),
        ({"norm_layer": "rmsnorm"}, "RmsNorm"),
        ({"mlp_layer": "SwiGLU", "act_layer": "silu"}, "SwiGLU"),
    ],
)
def test_from_timm_names_what_it_does_not_support(make, sentence):
    import timm.layers
    from timm.models import vision_transformer

    for key in ("block_fn", "mlp_layer"):
        if key in make:
            make = {key: getattr(vision_transformer, make[key], None) or timm.layers.SwiGLU}
    with pytest.raises(ValueError, match=f"from_timm: .*{sentence}.* not supported"):
        FusedViT.from_timm(timm_vit(**make))


def test_from_timm_refuses_other_models():
    with pytest.raises(ValueError, match="from_timm: the model Linear is not supported"):
        FusedViT.from_timm(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="need a model name"):
        FusedViT.from_timm(timm_vit(), pretrained=True)
