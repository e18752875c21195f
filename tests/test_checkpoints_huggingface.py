"""transformers' ViT and DINOv2 -> FusedViT: logits, every gradient, names of both versions."""

import copy
import json

import pytest
import torch
from checkpoint_pairs import (
    HUGGINGFACE,
    Plain,
    huggingface,
    needs_transformers,
    quietly,
)
from vit_pairs import logits_and_grads, relative_errors

from vitkernels import FusedViT, use_backend
from vitkernels.checkpoints.huggingface import timm_state
from vitkernels.testing import cases

pytestmark = pytest.mark.skipif(**needs_transformers)


def images(name="classifier"):
    channels = HUGGINGFACE[name][1].get("num_channels", 3)
    return torch.randn(2, channels, *HUGGINGFACE[name][2])


def their_results(model, x) -> dict[str, torch.Tensor]:
    """Logits and gradients under timm's names."""
    got = logits_and_grads(Plain(model), x)
    results = {name: got.pop(name) for name in ("logits", "images")}
    grads = {name.removeprefix("model."): g for name, g in got.items() if g is not None}
    class_token = next(grads[name] for name in grads if name.endswith("cls_token"))
    state = quietly(timm_state, "test", "test", grads)
    return results | state | {"cls_token": class_token}  # with registers its position is added


@pytest.mark.parametrize("name", HUGGINGFACE)
def test_logits_and_gradients(name):
    theirs, x = huggingface(name), images(name)
    ours = quietly(FusedViT.from_huggingface, theirs)
    base, got = their_results(theirs, x), logits_and_grads(ours, x)
    theirs = copy.deepcopy(theirs).double()
    truth = their_results(theirs, x.double())
    with use_backend("reference"):
        exact = logits_and_grads(quietly(FusedViT.from_huggingface, theirs), x.double())
    assert exact.keys() == truth.keys()
    errors = relative_errors(exact, truth)
    assert max(errors.values()) < 1e-9, sorted(errors.items(), key=lambda e: -e[1])[:3]
    base, errors = relative_errors(base, truth), relative_errors(got, truth)
    for key, error in errors.items():
        assert error <= max(2 * base[key], 1e-6), f"{key}: {error:.3g}, theirs {base[key]:.3g}"
    cases.record("from_huggingface", "auto", torch.float32, name)


@pytest.mark.parametrize("name", HUGGINGFACE)
def test_folders_as_save_pretrained_writes_them(name, tmp_path):
    theirs, x = huggingface(name), images(name)
    theirs.save_pretrained(tmp_path)
    expected = Plain(theirs)(x)
    for load in (FusedViT.from_huggingface, FusedViT.from_pretrained):
        ours = quietly(load, tmp_path)
        assert not ours.training
        assert relative_errors({"y": ours(x)}, {"y": expected})["y"] < 5e-6


def on_disk(key: str) -> str:
    """A name of version 5 in memory -> version 4's, written down by hand."""
    key = key.replace("layers.", "encoder.layer.")
    for new, old in {
        "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }.items():
        key = key.replace(new, old)
    return key


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("shards", [1, 3])
def test_pytorch_bin_with_names_of_both_versions(version, shards, tmp_path):
    theirs, x = huggingface(), images()
    state = {on_disk(k) if version == 4 else k: v for k, v in theirs.state_dict().items()}
    if version == 4:
        from safetensors.torch import load_file

        theirs.save_pretrained(tmp_path / "theirs")
        assert load_file(tmp_path / "theirs" / "model.safetensors").keys() == state.keys()
    theirs.config.save_pretrained(tmp_path)
    names = [f"pytorch_model-{i}.bin" for i in range(shards)] if shards > 1 else None
    for i in range(shards):
        part = dict(list(state.items())[i::shards])
        torch.save(part, tmp_path / (names[i] if names else "pytorch_model.bin"))
    if names:
        keys = {key: names[n % shards] for n, key in enumerate(state)}
        index = {"weight_map": keys}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    ours = FusedViT.from_huggingface(tmp_path)
    assert torch.equal(ours(x), FusedViT.from_huggingface(theirs)(x))


def test_sharded_safetensors(tmp_path):
    theirs, x = huggingface(), images()
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(FusedViT.from_huggingface(tmp_path)(x), FusedViT.from_huggingface(theirs)(x))


def test_a_bare_file_takes_the_default_eps(tmp_path):
    theirs, x = huggingface(), images()
    theirs.save_pretrained(tmp_path)
    ours = FusedViT.from_pretrained(tmp_path / "model.safetensors", num_heads=3)
    assert ours.blocks[0].norm1.eps == ours.norm.eps == 1e-12
    assert torch.equal(ours(x), FusedViT.from_huggingface(theirs)(x))


def test_a_bare_file_of_dinov2_takes_its_defaults(tmp_path):
    theirs = huggingface("dinov2")
    theirs.save_pretrained(tmp_path)
    ours = FusedViT.from_pretrained(tmp_path / "model.safetensors", num_heads=3)
    assert ours.norm.eps == 1e-6
    assert ours.patch_embed.mean.tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_a_preprocessor_that_does_not_normalize(tmp_path):
    huggingface().save_pretrained(tmp_path)
    settings = {"do_normalize": False, "image_mean": [0.1] * 3, "image_std": [0.2] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    embed = FusedViT.from_huggingface(tmp_path).patch_embed
    assert embed.mean.tolist() == [0.0] * 3 and embed.std.tolist() == [1.0] * 3


def test_the_pooler_is_reported():
    with pytest.warns(UserWarning, match=r"from_huggingface: pooler\.dense\.weight.* ignored"):
        FusedViT.from_huggingface(huggingface("model"))


def test_settings_are_the_configuration_s(tmp_path):
    theirs = huggingface("dropouts", layer_norm_eps=1e-7)
    ours = FusedViT.from_huggingface(theirs)
    assert ours.norm.eps == 1e-7 and ours.pos_drop.p == 0.1
    block = ours.blocks[1]
    assert (block.attn.attn_drop.p, block.attn.proj_drop.p) == (0.2, 0.1)
    assert (block.mlp.drop1.p, block.mlp.drop2.p) == (0.0, 0.1)  # timm has both or neither
    theirs.save_pretrained(tmp_path)
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    embed = FusedViT.from_huggingface(tmp_path).patch_embed
    assert embed.mean.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert embed.std.tolist() == pytest.approx([0.4, 0.5, 0.6])


def test_copies_and_keeps_what_the_source_is():
    theirs = huggingface().bfloat16().train()
    theirs.vit.embeddings.cls_token.requires_grad_(False)
    for part in ("q_proj", "k_proj", "v_proj"):
        getattr(theirs.vit.layers[1].attention, part).bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    ours = FusedViT.from_huggingface(theirs)
    frozen = [name for name, p in ours.named_parameters() if not p.requires_grad]
    assert frozen == ["cls_token", "blocks.1.attn.qkv.bias"]
    assert ours.training and all(p.dtype == torch.bfloat16 for p in ours.parameters())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], t) for name, t in theirs.state_dict().items())
    assert theirs.training


def test_constructor_arguments_replace_the_configuration_s():
    theirs, x = huggingface(), images()
    ours = FusedViT.from_huggingface(theirs, dynamic_img_size=True, drop_path_rate=0.2)
    assert ours.blocks[2].drop_path1.drop_prob == pytest.approx(0.2)
    assert torch.equal(ours(x), FusedViT.from_huggingface(theirs)(x))
    assert ours(torch.randn(1, 3, 48, 24)).shape == (1, 7)
