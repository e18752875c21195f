"""Files of hybrid ViTs of timm, JAX and transformers 4 -> FusedHybridViT: the source's logits."""

import copy
import json

import numpy as np
import pytest
import torch
from checkpoint_pairs import damaged, needs_transformers, refused
from hybrid_pairs import CONFIGS, TINY, images, timm_hybrid
from hybrid_sources import (
    LikeTransformers,
    huggingface_config,
    huggingface_hybrid,
    jax_hybrid,
)
from safetensors.torch import save_file
from vit_pairs import logits_and_grads, needs_timm, randomised, relative_errors, same, timm_vit

from vitkernels import FusedHybridViT, FusedSwin, FusedViT, use_backend
from vitkernels.nn import ResNetV2
from vitkernels.testing import cases

pytestmark = pytest.mark.skipif(**needs_timm)

# What the shapes of a configuration do not tell.
UNTOLD = {
    "odd_size": {"img_size": (41, 29)},
    "dynamic_size": {"dynamic_img_size": True},
    "dynamic_crop": {"dynamic_img_size": True},
    "dynamic_pad": {"dynamic_img_size": True, "dynamic_img_pad": True, "img_size": 32},
}
FROM_SHAPES = [n for n in CONFIGS if n not in ("no_projection", "symmetric", "pre_norm")]


@pytest.mark.parametrize("name", FROM_SHAPES)
def test_architecture_from_shapes(name, tmp_path):
    theirs, x = timm_hybrid(name), images(name)
    save_file(theirs.state_dict(), tmp_path / "m.safetensors")
    ours = FusedHybridViT.from_pretrained(
        tmp_path / "m.safetensors", num_heads=3, **UNTOLD.get(name, {})
    )
    same({"y": ours(x)}, {"y": theirs(x)})
    assert list(ours.state_dict()) == list(theirs.state_dict()) and not ours.training
    assert ours.patch_embed.img_size == theirs.patch_embed.img_size
    cases.record("FusedHybridViT.from_pretrained", "auto", torch.float32, name)


def test_a_folder_of_timm_s_hub(tmp_path):
    theirs, x = timm_hybrid("average_pool"), images("average_pool")
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "vit_small_r26_s32_224",
        "global_pool": "avg",
        "model_args": {"num_heads": 3},
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = FusedHybridViT.from_pretrained(tmp_path)
    same({"y": ours(x)}, {"y": theirs(x)})
    assert ours.patch_embed.std.tolist() == pytest.approx([0.4, 0.5, 0.6])


def test_dtype_and_a_fresh_head(tmp_path):
    theirs = timm_hybrid()
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "m.pth")
    ours = FusedHybridViT.from_pretrained(
        tmp_path / "m.pth", num_heads=3, dtype=torch.bfloat16, num_classes=4
    )
    assert ours.head.weight.shape == (4, 48) and not ours.training
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in ours.parameters())
    assert ours.patch_embed.mean.device.type == "cpu"


SIZES = {
    "image": {"img_size": 96},
    "not_square": {"img_size": (48, 80)},
    "patch": {"img_size": 64, "patch_size": 2},
    "one_channel": {"in_chans": 1},
    "five_channels": {"in_chans": 5},
}


@pytest.mark.parametrize("suffix", [".pth", ".npz"])
@pytest.mark.parametrize("size", SIZES)
def test_other_sizes_as_timm_resamples(size, suffix, tmp_path):
    from timm.models import adapt_input_conv
    from timm.models.vision_transformer_hybrid import checkpoint_filter_fn

    path, source = tmp_path / f"m{suffix}", timm_hybrid()
    theirs = timm_hybrid(**SIZES[size])
    if suffix == ".npz":
        np.savez(path, **jax_hybrid(source.state_dict(), 3))
        theirs.load_pretrained(str(path))
    else:
        torch.save(source.state_dict(), path)
        state = checkpoint_filter_fn(source.state_dict(), theirs)
        key = "patch_embed.backbone.stem.conv.weight"
        state[key] = adapt_input_conv(SIZES[size].get("in_chans", 3), state[key])
        theirs.load_state_dict(state)
    ours = FusedHybridViT.from_pretrained(path, num_heads=3, **SIZES[size])
    same(ours.state_dict(), theirs.state_dict(), 2e-6)
    embed = ours.patch_embed
    x = torch.randn(1, embed.in_chans, *embed.img_size)
    same({"y": ours(x)}, {"y": theirs(x)}, 1e-5)


# --- JAX ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["original", "augreg"])
@pytest.mark.parametrize("name", ["r", "r8"])
def test_jax_files_load_as_timm_loads_them(name, layout, tmp_path):
    theirs, x = timm_hybrid(name), images(name)
    arrays = jax_hybrid(theirs.state_dict(), 3, layout)
    np.savez(tmp_path / "m.npz", **arrays)
    fresh = timm_hybrid(name)
    fresh.load_pretrained(str(tmp_path / "m.npz"))
    ours = FusedHybridViT.from_pretrained(tmp_path / "m.npz")  # the heads are in a kernel's shape
    expected = fresh.state_dict()
    assert list(ours.state_dict()) == list(expected)
    assert all(torch.equal(t, expected[key]) for key, t in ours.state_dict().items())
    same({"y": ours(x)}, {"y": theirs(x)})
    cases.record("FusedHybridViT.from_pretrained", "auto", torch.float32, name, f"jax {layout}")


def test_jax_arrays_that_are_missing_or_not_read(tmp_path):
    arrays = jax_hybrid(timm_hybrid().state_dict(), 3)
    path = tmp_path / "m.npz"
    np.savez(path, **arrays, **{"block1/unit1/conv4/kernel": np.zeros((1, 1, 1, 1), np.float32)})
    refused("not expected: patch_embed.backbone.stages.0.blocks.0.conv4", _load, path)
    del arrays["block3/unit1/gn2/bias"]
    np.savez(path, **arrays)
    refused("missing patch_embed.backbone.stages.2.blocks.0.norm2.bias", _load, path)
    np.savez(path, **{k: a for k, a in arrays.items() if k != "gn_root/scale"}, odd=np.zeros(3))
    refused("does not fit FusedHybridViT: not expected: odd", _load, path)


def _load(path, **more):
    return FusedHybridViT.from_pretrained(path, **more)


# --- transformers 4 -------------------------------------------------------------------------------


def _same_eps(model, eps=1e-12):
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = eps
    return model


@pytest.mark.parametrize("base", ["vit.", ""])
@pytest.mark.parametrize("how", ["folder", "file", "model"])
def test_transformers_4(how, base, tmp_path):
    theirs, x = _same_eps(timm_hybrid()), images()
    tensors = huggingface_hybrid(theirs.state_dict(), base)
    if how == "model":
        ours = FusedHybridViT.from_huggingface(LikeTransformers(tensors, huggingface_config()))
    else:
        save_file(tensors, tmp_path / "model.safetensors")
        if how == "folder":
            (tmp_path / "config.json").write_text(json.dumps(huggingface_config()))
            ours = FusedHybridViT.from_huggingface(tmp_path)
            again = FusedHybridViT.from_pretrained(tmp_path)
            assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(),
                                                         strict=True))  # fmt: skip
        else:
            ours = FusedHybridViT.from_pretrained(tmp_path / "model.safetensors", num_heads=3)
    truth = logits_and_grads(copy.deepcopy(theirs).double(), x.double())
    with use_backend("reference"):
        same(logits_and_grads(copy.deepcopy(ours).double(), x.double()), truth, 1e-9)
    same({"y": ours(x)}, {"y": theirs(x)})
    cases.record("FusedHybridViT.from_huggingface", "reference", torch.float64, f"{how} {base}")


def test_what_transformers_configuration_says(tmp_path):
    tensors = huggingface_hybrid(timm_hybrid().state_dict())
    config = huggingface_config(
        layer_norm_eps=1e-3, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2,
        hidden_act="gelu_pytorch_tanh",
    )  # fmt: skip
    source = LikeTransformers(tensors, config).train()
    source.tensors["vit.embeddings.cls_token"].requires_grad_(False)
    ours = FusedHybridViT.from_huggingface(source)
    block = ours.blocks[0]
    assert (block.norm1.eps, block.attn.attn_drop.p, block.attn.proj_drop.p) == (1e-3, 0.2, 0.1)
    assert (block.mlp.drop1.p, block.mlp.drop2.p, ours.pos_drop.p) == (0.0, 0.1, 0.1)
    assert type(block.mlp.act).__name__ == "GELUTanh" and ours.training
    assert not ours.cls_token.requires_grad and ours.pos_embed.requires_grad


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"model_type": "vit"}, "model_type must be one of vit-hybrid, got 'vit': use FusedViT"),
        ({"backbone_config": {"layer_type": "preactivation"}}, "layer_type must be 'bottleneck'"),
        ({"backbone_config": {"model_type": "resnet"}}, "model_type must be 'bit', got 'resnet'"),
        ({"backbone_config": {"global_padding": "valid"}}, "global_padding must be 'same'"),
        ({"hidden_act": "mish"}, "hidden_act must be one of"),
    ],
)
def test_configurations_that_are_something_else(change, sentence):
    tensors = huggingface_hybrid(timm_hybrid().state_dict())
    source = LikeTransformers(tensors, huggingface_config(**change))
    refused(sentence, FusedHybridViT.from_huggingface, source)


@pytest.mark.skipif(**needs_transformers)
def test_our_resnet_is_the_bit_of_transformers():
    """The part of ViTHybrid that transformers still has."""
    import transformers

    config = transformers.BitConfig(
        layer_type="bottleneck", global_padding="same", depths=[2, 1, 1], embedding_size=64,
        hidden_sizes=[128, 256, 384], out_features=["stage3"], embedding_dynamic_padding=True,
    )  # fmt: skip
    theirs = randomised(transformers.BitBackbone(config).double().eval())
    ours = ResNetV2((2, 1, 1), (128, 256, 384)).double()
    start = "patch_embed.backbone."
    from vitkernels.checkpoints.hybrid_huggingface import timm_state

    prefixed = {f"embeddings.patch_embeddings.backbone.{key}": tensor
                for key, tensor in theirs.state_dict().items()}  # fmt: skip
    state = timm_state("test", "the model", prefixed)
    ours.load_state_dict({key.removeprefix(start): tensor for key, tensor in state.items()})
    x = torch.randn(2, 3, 61, 64).double()
    with torch.no_grad():
        expected = theirs(x).feature_maps[-1]
        assert relative_errors({"y": ours(x)}, {"y": expected})["y"] < 1e-9


# --- another backbone's file ----------------------------------------------------------------------


def _cnn():
    layers = (torch.nn.Conv2d(3, 32, 5, 8, 2), torch.nn.BatchNorm2d(32), torch.nn.ReLU())
    return torch.nn.Sequential(*layers)


def test_a_file_over_another_backbone(tmp_path):
    source = randomised(FusedHybridViT(_cnn(), 48, patch_size=2, **TINY).eval())
    source.patch_embed.backbone[1].running_mean.add_(0.5)
    torch.save(source.state_dict(), tmp_path / "m.pth")
    backbone, x = _cnn(), torch.randn(2, 3, 48, 48)
    before = {name: t.clone() for name, t in backbone.state_dict().items()}
    ours = FusedHybridViT.from_pretrained(tmp_path / "m.pth", backbone=backbone, num_heads=3)
    assert torch.equal(ours(x), source(x))
    assert ours.patch_embed.img_size == (48, 48) and ours.patch_embed.backbone is not backbone
    assert all(torch.equal(before[name], t) for name, t in backbone.state_dict().items())
    refused("its backbone is no ResNet of FusedHybridViT: name it", _load, tmp_path / "m.pth")
    refused(
        "does not fit FusedHybridViT: missing patch_embed.backbone.0.weight", _load,
        _saved(tmp_path, timm_hybrid().state_dict()), backbone=backbone, num_heads=3,
    )  # fmt: skip


def _saved(folder, state):
    torch.save(state, folder / "other.pth")
    return folder / "other.pth"


# --- refusals -------------------------------------------------------------------------------------


def test_each_family_names_the_other(tmp_path):
    hybrid = timm_hybrid().state_dict()
    path = _saved(tmp_path, hybrid)
    sentence = (
        "is a hybrid .ResNet stem. Vision Transformer, which FusedViT does not load: use Fuse"
    )
    refused(f"{sentence}dHybridViT.from_pretrained$", FusedViT.from_pretrained, path)
    np.savez(tmp_path / "m.npz", **jax_hybrid(hybrid, 3, "original"))
    refused(sentence, FusedViT.from_pretrained, tmp_path / "m.npz")
    refused(sentence, FusedViT.from_pretrained, _saved(tmp_path, huggingface_hybrid(hybrid)))
    with pytest.raises(ValueError, match="FusedSwin"):
        FusedSwin.from_pretrained(path)
    plain = (
        "is a Vision Transformer without a CNN, which FusedHybridViT does not load: use FusedViT"
    )
    refused(plain, _load, _saved(tmp_path, timm_vit().state_dict()))
    refused("must have the names of a hybrid", _load, _saved(tmp_path, {"a": torch.zeros(1)}))
    config = LikeTransformers(huggingface_hybrid(hybrid), huggingface_config())
    refused("got 'vit-hybrid': use FusedHybridViT", FusedViT.from_huggingface, config)


@pytest.mark.parametrize("seed", range(30))
def test_damaged_files_get_one_sentence(seed, tmp_path):
    random = np.random.default_rng(seed)
    state = {key: tensor.clone() for key, tensor in timm_hybrid("r8").state_dict().items()}
    if seed % 3 == 1:
        state = huggingface_hybrid(state)
    broken = damaged(state, random)
    path = tmp_path / "m.npz"
    if seed % 3 == 2:
        arrays = {k: torch.from_numpy(a) for k, a in jax_hybrid(state, 3).items()}
        np.savez(path, **{k: t.numpy() for k, t in damaged(arrays, random).items()})
    else:
        path = _saved(tmp_path, broken)
    try:
        model = FusedHybridViT.from_pretrained(path, num_heads=3)
    except ValueError as error:
        assert str(error).startswith(("from_pretrained: ", "HybridEmbed: ")), error
        assert "\n" not in str(error)
    else:  # what was lost is not needed, such as the head
        model(torch.randn(1, 3, *model.patch_embed.img_size))
