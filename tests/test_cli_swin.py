"""The command line on Swin Transformers: bench, check, predict, attention-map."""

import csv
import json

import pytest
import torch
from cli_material import (
    CLASSES,
    TINY_SWIN,
    drawing,
    photograph,
    predict_json,
    run,
    save_photograph,
    save_tiny,
    save_tiny_swin,
    tiny_swin,
)
from PIL import Image
from swin_pairs import needs_timm

from vitkernels import FusedSwin, FusedViT
from vitkernels.cli import naming
from vitkernels.cli.families import family_of_weights
from vitkernels.cli.heat import panels_of
from vitkernels.testing import cases

SMALL = ["--image-size", "64", "--threads", "1"]
FEWER = {"embed_dim": 32, "depths": (2, 1, 2, 1), "num_heads": (1, 2, 4, 8)}


@pytest.fixture
def tiny(tmp_path):
    return save_tiny_swin(tmp_path)


@pytest.fixture
def fewer_channels(monkeypatch):
    """Of timm's models by name, for time; windows and what differs between names stay."""
    make = naming.make_timm_model
    small = {**FEWER, "num_classes": 10}
    monkeypatch.setattr(naming, "make_timm_model", lambda n, **more: make(n, **{**small, **more}))


# --- bench ----------------------------------------------------------------------------------------


@pytest.mark.skipif(**needs_timm)
def test_the_race_has_timm_on_sdpa_too(tmp_path, capsys, fewer_channels):
    words = ["--quick", "--no-compile", "--csv", tmp_path / "a.csv", "--json", tmp_path / "a.json"]
    name = "swin_tiny_patch4_window7_224"
    status, out, _ = run(capsys, "bench", "--model", name, *SMALL, *words)
    assert status == 0, out
    assert "attention MiB" in out
    with (tmp_path / "a.csv").open() as file:
        found = {(row["contender"], row["dtype"]) for row in csv.DictReader(file)}
    names = ("timm", "timm TIMM_FUSED_ATTN=2", "vitkernels")
    assert found == {(n, dtype) for n in names for dtype in ("float32", "bfloat16")}
    record = json.loads((tmp_path / "a.json").read_text())
    assert [result["direction"] for result in record["results"]] == ["forward"] * 2 + ["train"] * 2
    for result in record["results"]:
        kept = {entry["name"]: entry["attention"] for entry in result["contenders"]}
        if result["direction"] == "forward":
            assert set(kept.values()) == {None}
        else:
            assert 0 < kept["vitkernels"] < min(kept[n] for n in names[:2])


@pytest.mark.skipif(**needs_timm)
def test_timms_switch_is_where_it_was():
    from timm.layers import use_fused_attn

    from vitkernels.cli.bench.contenders import TIMM_FUSED, Sources
    from vitkernels.cli.timm_peer import fused_attention

    def levels(model):
        return {m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")}

    small = {"img_size": 32, "depths": (1, 1), "num_heads": (1, 2), "embed_dim": 32}
    before = use_fused_attn(), use_fused_attn(experimental=True)
    with fused_attention(2):
        sources = Sources.make("swin_tiny_patch4_window7_224", small, 0)
        assert use_fused_attn(experimental=True)
    assert (use_fused_attn(), use_fused_attn(experimental=True)) == before
    assert levels(sources.yardstick) == {False}
    assert levels(sources.peers[TIMM_FUSED]) == {True}
    for name, value in sources.yardstick.state_dict().items():
        assert torch.equal(sources.peers[TIMM_FUSED].state_dict()[name], value)
    # Timm's switch changes neither its ViT, on SDPA by default, nor its Swin V2, never on it.
    assert Sources.make("vit_tiny_patch16_224", {"depth": 1}, 0).peers == {}
    small |= {"window_size": 4}
    assert Sources.make("swinv2_tiny_window8_256", small, 0).peers == {}
    with fused_attention(0), pytest.raises(RuntimeError):
        assert levels(naming.make_timm_model("vit_tiny_patch16_224", depth=1)) == {False}
        raise RuntimeError
    assert (use_fused_attn(), use_fused_attn(experimental=True)) == before


# --- check ----------------------------------------------------------------------------------------

CHECKED = {
    "swin_tiny_patch4_window7_224": [],
    "swin_s3_tiny_224": ["--dtype", "float32"],
    "swinv2_tiny_window8_256": ["--dtype", "float32"],
}


@pytest.mark.skipif(**needs_timm)
@pytest.mark.parametrize("name", CHECKED)
def test_check_holds(capsys, fewer_channels, name):
    words = ["--model", name, "--batch", 1, *SMALL, *CHECKED[name]]
    status, out, err = run(capsys, "check", *words)
    assert status == 0, out + err
    assert out.rstrip().endswith("holds")
    cases.record("vitkernels check", "auto", "float64, fp32, bf16", name)


# --- predict --------------------------------------------------------------------------------------


def test_the_family_is_read_off_the_names(tmp_path):
    (tmp_path / "vit").mkdir()
    assert family_of_weights(save_tiny_swin(tmp_path)[0]).model is FusedSwin
    assert family_of_weights(save_tiny_swin(tmp_path, "v2.pth", version=2)[0]).model is FusedSwin
    assert family_of_weights(save_tiny(tmp_path / "vit")[0]).model is FusedViT
    torch.save({"layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    assert family_of_weights(tmp_path / "resnet.pth").model is FusedViT
    assert family_of_weights(tmp_path / "absent.pth").model is FusedViT


@pytest.mark.skipif(**needs_timm)
def test_probabilities_are_those_of_timm(tmp_path, capsys, tiny):
    from timm.data import create_transform
    from timm.models.swin_transformer import SwinTransformer

    path, model = tiny
    theirs = SwinTransformer(**TINY_SWIN, num_classes=CLASSES).eval()
    theirs.load_state_dict(model.state_dict())
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of Swin by default
    transform = create_transform(
        (3, 32, 32), interpolation="bicubic", crop_pct=0.9, mean=mean, std=std
    )
    with torch.no_grad():
        expected = theirs(transform(photograph())[None]).softmax(-1)[0]
    photograph().save(tmp_path / "china.png")
    words = [tmp_path / "china.png", "--weights", path, "--topk", CLASSES]
    (found,) = predict_json(capsys, *words)
    for p in found["predictions"]:
        assert p["probability"] == pytest.approx(expected[p["class"]].item(), abs=1e-5)


def test_weights_of_transformers_in_a_folder(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=32, embed_dim=32, depths=[2, 2], num_heads=[1, 2], window_size=4,
        num_labels=CLASSES,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.SwinForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path / "swin")
    facts = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}}
    (tmp_path / "swin" / "preprocessor_config.json").write_text(json.dumps(facts))
    image = photograph().resize((32, 32))
    image.save(tmp_path / "small.png")
    x = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(32, 32, 3)
    with torch.no_grad():
        expected = theirs(x.permute(2, 0, 1)[None] / 127.5 - 1).logits.softmax(-1)[0]
    words = [tmp_path / "small.png", "--weights", tmp_path / "swin", "--topk", CLASSES]
    (found,) = predict_json(capsys, *words)
    for p in found["predictions"]:
        assert p["probability"] == pytest.approx(expected[p["class"]].item(), abs=1e-5)


def test_weights_with_their_timm_name(tmp_path, capsys):
    """Of the name: windows that were pre-trained smaller, which Swin V2's shapes do not tell."""
    like = FusedSwin.named("swinv2_base_window12to16_192to256", **FEWER)
    assert naming.family_of(like).unwritten(like) == {
        "pretrained_window_sizes": [(12, 12), (12, 12), (12, 12), (6, 6)]
    }
    name = "swin_tiny_patch4_window7_224"
    model = FusedSwin.named(name, num_classes=CLASSES, weight_init="skip")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    loaded = naming.load_model(name, tmp_path / "w.pth")
    assert loaded.num_classes == CLASSES and loaded.patch_embed.img_size == (224, 224)


# --- attention-map --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, maps",
    [
        ([], 4),
        (["--stage", 1], 2),
        (["--block", -1, "--head", "all"], 2),
        (["--head", 0, "--query", "0.1,0.9"], 4),
    ],
)
def test_maps_are_drawn(tmp_path, capsys, tiny, options, maps):
    image, out = save_photograph(tmp_path), tmp_path / "map.png"
    words = [image, "--out", out, "--weights", tiny[0], *options]
    status, said, err = run(capsys, "attention-map", *words)
    assert status == 0 and err == "" and f"{maps} map" in said
    with Image.open(out) as drawn:
        assert min(drawn.size) > 400
        assert torch.frombuffer(bytearray(drawn.tobytes()), dtype=torch.uint8).float().std() > 10


@pytest.mark.parametrize("img_size", [32, (40, 24)], ids=["whole windows", "padded"])
def test_every_token_lies_at_its_place(img_size):
    """Against the scores of each pair of tokens, found by coordinates alone."""
    model = tiny_swin(img_size=img_size)
    x = torch.randn(1, 3, *model.patch_embed.img_size)
    H, W = model.patch_embed.grid_size
    maps = model.attention_maps(x)
    for i in (0, 1):
        shift = maps[i].shift[0]
        assert shift == (0, 2)[i]
        panel = panels_of(model, x, drawing(block=i))[0]
        assert panel.heat.shape == (H, W) and panel.windows.shape == (H, W)
        assert panel.title == ("block 0 (stage 0)", "block 1 (stage 0, shifted)")[i]
        ids = (torch.arange(H)[:, None] - shift) // 4 * 100 + (torch.arange(W) - shift) // 4
        same = panel.windows.flatten()[:, None] == panel.windows.flatten()
        inner = (slice(shift, H - shift), slice(shift, W - shift))  # wrapped windows have two ids
        inside = torch.zeros(H, W, dtype=torch.bool)
        inside[inner] = True
        pairs = inside.flatten()[:, None] & inside.flatten()
        assert torch.equal(same[pairs], (ids.flatten()[:, None] == ids.flatten())[pairs])
        row, column = H // 2, W // 2 - 1
        point = ((column + 0.5) / W, (row + 0.5) / H)
        asked = panels_of(model, x, drawing(block=i, query=point))[0]
        assert asked.query == (row, column)
        seen = ~asked.heat.isnan()
        assert torch.equal(seen, panel.windows == panel.windows[row, column])
        assert asked.heat[seen].mean().item() == pytest.approx(1, abs=1e-5)  # an equal share


def test_equal_attention_is_one_everywhere():
    model = tiny_swin(img_size=(40, 24))
    for stage in model.layers:
        for block in stage.blocks:
            torch.nn.init.zeros_(block.attn.qkv.weight)
            torch.nn.init.zeros_(block.attn.qkv.bias)
            torch.nn.init.zeros_(block.attn.relative_position_bias_table)
    x = torch.randn(1, 3, 40, 24)
    for panel in panels_of(model, x, drawing()):
        assert torch.allclose(panel.heat, torch.ones_like(panel.heat), atol=1e-5), panel.title


def test_over_a_seam_nothing_is_seen():
    """A corner token of a shifted map: its window lies at all four corners."""
    model = tiny_swin()
    corner = panels_of(model, torch.randn(1, 3, 32, 32), drawing(block=1, query=(0, 0)))[0]
    assert (corner.windows == corner.windows[0, 0]).sum() == 16
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:2, :2] = True
    assert torch.equal(~corner.heat.isnan(), expected)


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.skipif(**needs_timm)
def test_names_mean_what_they_mean_in_timm(monkeypatch):
    """The constructor arguments of every Swin that timm registers, and its image size."""
    import timm
    from timm.models import swin_transformer, swin_transformer_v2

    from vitkernels.models.swin_names import swin_settings

    asked = {}
    for module, maker in (
        (swin_transformer, "_create_swin_transformer"),
        (swin_transformer_v2, "_create_swin_transformer_v2"),
    ):
        monkeypatch.setattr(module, maker, lambda name, pretrained, **more: (name, more))
        for name in timm.list_models(module=module.__name__.rpartition(".")[2]):
            asked[name] = getattr(module, name)()[1]
    assert len(asked) >= 20
    for name, expected in asked.items():
        got = swin_settings(name)
        assert got.pop("version", 1) == (2 if name.startswith("swinv2") else 1)
        assert got.pop("img_size") == timm.models.get_pretrained_cfg(name).input_size[-1]
        assert got == {"patch_size": 4, **expected}, name
    for name in (
        "swin_huge_patch4_window7_224",
        "swinv2_cr_tiny_224",
        "swin_tiny_patch4_window0_224",
    ):
        with pytest.raises(ValueError, match=r"^FusedSwin\.named: name must be swin_SIZE"):
            swin_settings(name)
