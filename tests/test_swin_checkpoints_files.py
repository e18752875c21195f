"""Swin checkpoint files and folders of every source -> FusedSwin; other sizes as timm fits them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from swin_sources import (
    huggingface_swin,
    microsoft_state,
    needs_timm,
    needs_transformers,
    timm_swin,
    torchvision_swin,
)
from timm_stub import timm
from vit_pairs import same

from vitkernels import FusedSwin
from vitkernels.testing import cases

pytestmark = pytest.mark.skipif(**needs_timm)


def images(*size):
    return torch.randn(2, 3, *(size or (64, 64)))


# --- timm and Microsoft ---------------------------------------------------------------------------

# name: (version, timm's arguments, what shapes do not tell)
SHAPES = {
    "plain": (1, {}, {}),
    "no classes": (1, {"num_classes": 0}, {}),
    "no biases": (1, {"qkv_bias": False, "mlp_ratio": 2.5}, {}),
    "windows of each stage": (1, {"window_size": (4, 2, 4)}, {}),
    "heads of another width": (1, {"head_dim": 8}, {}),
    "not square": (1, {"window_size": (2, 4), "img_size": (64, 96)},
                   {"window_size": (2, 4), "img_size": (64, 96)}),
    "v2": (2, {}, {"window_size": 4, "img_size": 64}),
    "v2 no biases": (2, {"qkv_bias": False}, {"window_size": 4, "img_size": (64, 64)}),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_architecture_from_shapes(name, tmp_path):
    version, settings, untold = SHAPES[name]
    theirs, path = timm_swin(version, **settings), tmp_path / "model.safetensors"
    save_file(theirs.state_dict(), path)
    x = images(*theirs.patch_embed.img_size)
    ours = FusedSwin.from_pretrained(path, **untold)
    same({"y": ours(x)}, {"y": theirs(x)})
    assert list(ours.state_dict()) == list(theirs.state_dict()) and not ours.training
    cases.record("FusedSwin.from_pretrained", "auto", torch.float32, name)


def test_widths_and_mlps_of_each_stage_show_in_the_shapes(tmp_path):
    sizes = {"embed_dim": (8, 24, 40), "mlp_ratio": (4.0, 2.0, 3.0), "num_classes": 5}
    made = FusedSwin(64, depths=(1, 2, 1), num_heads=(1, 3, 5), window_size=4, **sizes).eval()
    save_file(made.to_timm_state_dict(), tmp_path / "m.safetensors")
    loaded, x = FusedSwin.from_pretrained(tmp_path / "m.safetensors"), images()
    assert torch.equal(loaded(x), made(x))


def test_files_of_timm_keep_timm_s_order_off_the_grid(tmp_path):
    theirs, x = timm_swin(img_size=(72, 80)), images(72, 80)
    save_file(theirs.state_dict(), tmp_path / "m.safetensors")
    ours = FusedSwin.from_pretrained(tmp_path / "m.safetensors", img_size=(72, 80))
    same({"y": ours(x)}, {"y": theirs(x)})
    padded_first = FusedSwin.from_pretrained(
        tmp_path / "m.safetensors", img_size=(72, 80), pad_mode="pad_roll"
    )
    assert (padded_first(x) - theirs(x)).norm() > 1e-3 * theirs(x).norm()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_files_of_microsoft_tell_everything(version, suffix, tmp_path):
    more = {"pretrained_window_sizes": (3, 3, 2)} if version == 2 else {}
    theirs, x, path = timm_swin(version, **more), images(), tmp_path / f"swin{suffix}"
    torch.save({"model": microsoft_state(theirs), "max_accuracy": 81.2, "epoch": 299}, path)
    ours = FusedSwin.from_pretrained(path)
    same({"y": ours(x)}, {"y": theirs(x)})
    assert ours.patch_embed.img_size == (64, 64)


NAMES = [
    "swin_tiny_patch4_window7_224", "swin_base_patch4_window12_384", "swin_s3_tiny_224",
    "swin_s3_base_224", "swinv2_tiny_window8_256", "swinv2_small_window16_256",
    "swinv2_base_window12_192", "swinv2_base_window12to16_192to256",
    "swinv2_large_window12to24_192to384",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_timm_s_hub(name, tmp_path):
    small = {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 4), "num_classes": 2}
    theirs = timm.create_model(name, **small).bfloat16()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": name,
        "global_pool": "avg",
        "model_args": {"num_heads": [1, 1, 2, 4]},
        "pretrained_cfg": {
            "mean": [0.1, 0.2, 0.3],
            "input_size": [3, *theirs.patch_embed.img_size],
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = FusedSwin.from_pretrained(tmp_path)
    assert ours.patch_embed.mean.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert ours.patch_embed.img_size == theirs.patch_embed.img_size

    def windows(model):
        blocks = [block for stage in model.layers for block in stage.blocks]
        return [(b.window_size, b.shift_size, getattr(b.attn, "pretrained_window_size", None))
                for b in blocks]  # fmt: skip

    assert windows(ours) == windows(theirs)


# --- transformers ---------------------------------------------------------------------------------


def on_disk(key: str) -> str:
    """A name of version 5 in memory -> version 4's, written down by hand."""
    for new, old in {
        "attention.q_proj": "attention.self.query",
        "attention.k_proj": "attention.self.key",
        "attention.v_proj": "attention.self.value",
        "attention.o_proj": "attention.output.dense",
        "attention.relative_position_bias.": "attention.self.",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }.items():
        key = key.replace(new, old)
    return key


@pytest.mark.skipif(**needs_transformers)
@pytest.mark.parametrize("form", ["saved", "4", "5", "shards of 4", "saved in shards"])
@pytest.mark.parametrize("version", [1, 2])
def test_folders_of_transformers(version, form, tmp_path):
    theirs, x = huggingface_swin(version, pretrained_window_sizes=[3, 3, 2]), images(80, 72)
    if form.startswith("saved"):
        size = {"max_shard_size": "20KB"} if "shards" in form else {}
        theirs.save_pretrained(tmp_path, **size)
        assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("shards" in form)
    else:
        state = {on_disk(k) if "4" in form else k: t for k, t in theirs.state_dict().items()}
        if "4" in form:  # these files have the indices too
            block = "encoder.layers.0.blocks.0.attention.self.relative_position_index"
            state[f"swin{'v2' * (version == 2)}.{block}"] = torch.zeros(16, 16).long()
        theirs.config.save_pretrained(tmp_path)
        if form == "shards of 4":
            names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
            for i, name in enumerate(names):
                save_file(dict(list(state.items())[i::2]), tmp_path / name)
            index = {"weight_map": {key: names[n % 2] for n, key in enumerate(state)}}
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        else:
            save_file(state, tmp_path / "model.safetensors")
    expected = {"y": theirs(x).logits}
    for load in (FusedSwin.from_huggingface, FusedSwin.from_pretrained):
        ours = load(tmp_path)
        assert not ours.training
        same({"y": ours(x)}, expected)


@pytest.mark.skipif(**needs_transformers)
def test_names_of_version_4_are_those_that_transformers_writes(tmp_path):
    theirs = huggingface_swin()
    theirs.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors").keys()
    assert written == {on_disk(key) for key in theirs.state_dict()}


@pytest.mark.skipif(**needs_transformers)
@pytest.mark.parametrize("version", [1, 2])
def test_a_bare_file_of_transformers(version, tmp_path):
    theirs, x = huggingface_swin(version), images(64, 96)
    theirs.save_pretrained(tmp_path)
    untold = {"window_size": 4, "img_size": 64} if version == 2 else {}
    ours = FusedSwin.from_pretrained(tmp_path / "model.safetensors", **untold)
    same({"y": ours(x)}, {"y": theirs(x).logits})


@pytest.mark.skipif(**needs_transformers)
def test_the_preprocessor_says_how_to_normalise(tmp_path):
    huggingface_swin().save_pretrained(tmp_path)
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    embed = FusedSwin.from_huggingface(tmp_path).patch_embed
    assert embed.std.tolist() == pytest.approx([0.4, 0.5, 0.6])


# --- torchvision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_torchvision(version, tmp_path):
    theirs, x = torchvision_swin(version), images(74, 97)
    torch.save(theirs.state_dict(), tmp_path / "swin_t-704ceda3.pth")
    ours = FusedSwin.from_pretrained(tmp_path / "swin_t-704ceda3.pth")
    same({"y": ours(x)}, {"y": theirs(x)})


# --- wrappers, other sizes ------------------------------------------------------------------------

WRAPPED = {
    "ema": lambda state: {"state_dict": {k: t + 1 for k, t in state.items()}, "model_ema": state},
    "compiled": lambda state: {"model": {"module._orig_mod." + k: t for k, t in state.items()}},
    "lightning": lambda state: {"state_dict": {"model." + key: t for key, t in state.items()}},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrappers_and_prefixes(how, tmp_path):
    theirs, x = timm_swin(), images()
    torch.save(WRAPPED[how](theirs.state_dict()), tmp_path / "m.pt")
    same({"y": FusedSwin.from_pretrained(tmp_path / "m.pt")(x)}, {"y": theirs(x)})


OTHER_SIZES = {
    "image": {"img_size": 96},
    "smaller image": {"img_size": 32},
    "not square": {"img_size": (64, 32)},
    "window": {"window_size": 7, "img_size": 112},
    "windows": {"window_size": (4, (2, 8), 4)},
    "patch": {"patch_size": 8, "img_size": 128},
    "one channel": {"in_chans": 1},
    "five channels": {"in_chans": 5},
}


@pytest.mark.parametrize("size", OTHER_SIZES)
@pytest.mark.parametrize("version", [1, 2])
def test_other_sizes_are_timm_s(size, version, tmp_path):
    from timm.models import swin_transformer, swin_transformer_v2

    source, settings = timm_swin(version), {"img_size": 64, **OTHER_SIZES[size]}
    save_file(source.state_dict(), tmp_path / "m.safetensors")
    theirs = timm_swin(version, **settings)
    adapt = (swin_transformer, swin_transformer_v2)[version - 1].checkpoint_filter_fn
    state = adapt(source.state_dict(), theirs)
    if "in_chans" in settings:
        weight = state["patch_embed.proj.weight"]
        adapted = timm.models.adapt_input_conv(settings["in_chans"], weight)
        state["patch_embed.proj.weight"] = adapted
    theirs.load_state_dict(state)
    untold = {"window_size": 4} if version == 2 else {}
    ours = FusedSwin.from_pretrained(tmp_path / "m.safetensors", **{**untold, **settings})
    expected = theirs.state_dict()
    for key, got in ours.state_dict().items():
        assert got.shape == expected[key].shape
        assert (got - expected[key]).norm() <= 2e-6 * expected[key].norm(), key
    x = torch.randn(2, settings.get("in_chans", 3), *theirs.patch_embed.img_size)
    same({"y": ours(x)}, {"y": theirs(x)})


def test_device_and_dtype_and_a_fresh_head(tmp_path):
    theirs, path = timm_swin(), tmp_path / "m.pth"
    torch.save(theirs.state_dict(), path)
    ours = FusedSwin.from_pretrained(path, dtype=torch.bfloat16, num_classes=4)
    assert ours.head.fc.weight.shape == (4, 48) and ours.head.fc.bias.abs().max() == 0
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in ours.parameters())
    assert torch.equal(ours.norm.weight, theirs.norm.weight.bfloat16())
    headless = FusedSwin.from_pretrained(path, num_classes=0)
    assert headless(images()).shape == (2, 48)
