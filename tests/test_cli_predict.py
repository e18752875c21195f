"""vitkernels predict and attention-map: the numbers, the files, the pictures."""

import json

import numpy as np
import pytest
import torch
from cli_material import (
    CLASSES,
    drawing,
    gradient,
    photograph,
    predict_json,
    run,
    save_photograph,
    save_tiny,
)
from PIL import Image
from vit_pairs import needs_timm

from vitkernels.cli.labels import read_labels
from vitkernels.cli.usage import UsageError


@pytest.fixture
def tiny(tmp_path):
    return save_tiny(tmp_path)


# --- predict --------------------------------------------------------------------------------------


@pytest.mark.skipif(**needs_timm)
def test_probabilities_are_those_of_timm(tmp_path, capsys, tiny):
    """timm's transform with its normalisation, timm's model, the same weights."""
    from timm.data import create_transform
    from timm.models.vision_transformer import VisionTransformer

    path, model = tiny
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    theirs = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=CLASSES
    ).eval()
    theirs.load_state_dict(model.state_dict())
    transform = create_transform(
        (3, 32, 32), interpolation="bicubic", crop_pct=0.9, mean=mean, std=std
    )
    names = ["china", "flower"]
    with torch.no_grad():
        expected = theirs(torch.stack([transform(photograph(n)) for n in names])).softmax(-1)
    for name in names:
        photograph(name).save(tmp_path / f"{name}.png")
    found = predict_json(
        capsys, tmp_path / "china.png", tmp_path / "flower.png", "--weights", path,
        "--topk", CLASSES, "--mean", ",".join(map(str, mean)), "--std", ",".join(map(str, std)),
    )  # fmt: skip
    for entry, truth in zip(found, expected, strict=True):
        got = {p["class"]: p["probability"] for p in entry["predictions"]}
        assert (torch.tensor([got[i] for i in range(CLASSES)]) - truth).abs().max() < 1e-5
        assert [p["probability"] for p in entry["predictions"]] == sorted(got.values())[::-1]


def test_batches_change_nothing(tmp_path, capsys, tiny):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(5):
        gradient(40 + 7 * i, 33).save(folder / f"{i}.png")
    found = [
        predict_json(capsys, folder, "--weights", tiny[0], "--batch", batch, "--topk", 3)
        for batch in (1, 2, 5, 99)
    ]
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert a["image"] == b["image"]
            for p, q in zip(a["predictions"], b["predictions"], strict=True):
                assert p["class"] == q["class"]
                assert p["probability"] == pytest.approx(q["probability"], abs=1e-6)


def test_table_names_images_labels_and_preprocessing(tmp_path, capsys, tiny):
    image = save_photograph(tmp_path)
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"thing {i}\n" for i in range(CLASSES)))
    status, out, err = run(capsys, "predict", image, "--weights", tiny[0], "--labels", labels)
    assert status == 0 and err == ""
    assert str(image) in out and out.count("thing ") == 5 and out.count("%") == 5
    assert "32x32 pixels, center crop 0.9, bicubic, mean 0.5, std 0.5" in out


def test_bf16_finds_the_same_class(tmp_path, capsys, tiny):
    image = save_photograph(tmp_path)
    a, b = (
        predict_json(capsys, image, "--weights", tiny[0], "--dtype", dtype)[0]["predictions"]
        for dtype in ("float32", "bfloat16")
    )
    assert a[0]["class"] == b[0]["class"]
    assert a[0]["probability"] == pytest.approx(b[0]["probability"], abs=0.05)
    assert a[0]["probability"] != b[0]["probability"]


def test_mean_and_std_matter(tmp_path, capsys, tiny):
    image = save_photograph(tmp_path)
    seen = set()
    for more in ([], ["--mean", "0.3"], ["--std", "0.25"], ["--mean", "0.5,0.5,0.3"]):
        found = predict_json(capsys, image, "--weights", tiny[0], *more)
        seen.add(found[0]["predictions"][0]["probability"])
    assert len(seen) == 4


CONFIGS = {
    "timm": (
        "config.json",
        {"architecture": "x", "pretrained_cfg": {
            "mean": [0.4, 0.4, 0.4], "std": [0.3, 0.3, 0.3], "crop_pct": 1.0,
            "interpolation": "bilinear"}},
        "center crop 1, bilinear, mean 0.4, std 0.3: config.json beside the weights",
    ),
    "transformers": (
        "preprocessor_config.json",
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5], "resample": 3,
         "size": {"height": 32, "width": 32}},
        "squash crop 1, bicubic, mean 0.1, 0.2, 0.3, std 0.5: preprocessor_config.json beside",
    ),
    "transformers_crop": (
        "preprocessor_config.json",
        {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 2,
         "size": {"shortest_edge": 40}, "do_center_crop": True,
         "crop_size": {"height": 32, "width": 32}},
        "center crop 0.8, bilinear, mean 0.5, std 0.5: preprocessor_config.json beside",
    ),
    "transformers_unnormalized": (
        "preprocessor_config.json",
        {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_normalize": False},
        "mean 0, std 1: preprocessor_config.json beside",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_preprocessing_is_read_beside_the_weights(tmp_path, capsys, tiny, name):
    file, facts, said = CONFIGS[name]
    image = save_photograph(tmp_path)
    (tmp_path / file).write_text(json.dumps(facts))
    status, out, _ = run(capsys, "predict", image, "--weights", tiny[0])
    assert status == 0 and said in out
    status, out, _ = run(capsys, "predict", image, "--weights", tiny[0], "--crop-pct", "0.75")
    assert "crop 0.75" in out and "and arguments" in out


def test_gray_model_and_other_image_size(tmp_path, capsys):
    path, _ = save_tiny(tmp_path, in_chans=1)
    image = save_photograph(tmp_path)
    assert len(predict_json(capsys, image, "--weights", path)) == 1
    status, out, _ = run(capsys, "predict", image, "--weights", path, "--image-size", 64)
    assert status == 0 and "64x64 pixels" in out
    status, out, _ = run(capsys, "predict", image, "--weights", path, "--image-size", 36)
    assert status == 0 and "36x36 pixels" in out  # four patches of 8, 4 pixels left out


@pytest.mark.parametrize("key", ["id2label", "label_names"])
def test_labels_beside_the_weights(tmp_path, capsys, tiny, key):
    image = save_photograph(tmp_path)
    names = [f"thing {i}" for i in range(CLASSES)]
    facts = {key: dict(enumerate(names)) if key == "id2label" else names}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    top = predict_json(capsys, image, "--weights", tiny[0])[0]["predictions"][0]
    assert top["label"] == f"thing {top['class']}"
    (tmp_path / "config.json").write_text(json.dumps({key: names[:-1]}))
    assert (
        "class " in predict_json(capsys, image, "--weights", tiny[0])[0]["predictions"][0]["label"]
    )


def test_weights_of_transformers_in_a_folder(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=128,
        image_size=32, patch_size=8, num_labels=CLASSES,
    )  # fmt: skip
    theirs = transformers.ViTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path / "vit")
    facts = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    facts |= {"size": {"height": 32, "width": 32}}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(facts))
    image = photograph().resize((32, 32))
    image.save(tmp_path / "small.png")
    x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = theirs(x).logits.softmax(-1)[0]
    found = predict_json(
        capsys, tmp_path / "small.png", "--weights", tmp_path / "vit", "--topk", CLASSES
    )
    for p in found[0]["predictions"]:
        assert p["probability"] == pytest.approx(expected[p["class"]].item(), abs=1e-5)
        assert p["label"] == f"LABEL_{p['class']}"


def test_outputs_that_are_not_numbers(tmp_path, capsys):
    path, model = save_tiny(tmp_path)
    model.head.bias.data[0] = float("nan")
    torch.save(model.state_dict(), path)
    status, out, err = run(capsys, "predict", save_photograph(tmp_path), "--weights", path)
    assert status == 2 and out == "" and "are not numbers" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "text",
    [
        "a\nb\nc\n",
        "\ufeffa\r\nb\r\nc\r\n\r\n",
        '["a", "b", "c"]',
        '{"0": "a", "1": "b", "2": "c"}',
        '{"2": "c", "0": "a", "1": "b"}',
        '{"0": ["n01", "a"], "1": ["n02", "b"], "2": ["n03", "c"]}',
        '{"id2label": {"0": "a", "1": "b", "2": "c"}, "model_type": "vit"}',
    ],
)
def test_forms_of_labels(tmp_path, text):
    (tmp_path / "labels").write_bytes(text.encode())
    assert read_labels(tmp_path / "labels", 3) == ["a", "b", "c"]
    with pytest.raises(UsageError, match="names 3 classes, the weights have 4"):
        read_labels(tmp_path / "labels", 4)


# --- attention-map --------------------------------------------------------------------------------


def picture(path) -> np.ndarray:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize(
    "options, maps, pool",
    [
        ([], 2, "token"),
        ([], 2, "avg"),
        (["--block", -1, "--head", 1], 1, "token"),
        (["--head", "all"], 2, "token"),
        (["--rollout"], 1, "avg"),
    ],
)
def test_maps_are_drawn(tmp_path, capsys, options, maps, pool):
    more = {} if pool == "token" else {"class_token": False, "global_pool": "avg"}
    path, _ = save_tiny(tmp_path, embed_dim=128, num_heads=2, **more)
    image, out = save_photograph(tmp_path), tmp_path / "map.png"
    status, said, err = run(
        capsys, "attention-map", image, "--out", out, "--weights", path, *options
    )
    assert status == 0 and err == "" and f"{maps} map" in said
    pixels = picture(out)
    assert min(pixels.shape[:2]) > 400 and pixels.std() > 10
    assert (pixels.max(-1) - pixels.min(-1)).max() > 60, "it has colours"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([image.name, "map.png", path.name])


def test_the_map_shows_where_the_class_token_looks(tmp_path):
    from vitkernels.cli.heat import panels_of

    _, model = save_tiny(tmp_path)
    x = torch.randn(1, 3, 32, 32)
    options = drawing(block=1)
    (panel,) = panels_of(model, x, options)
    expected = model.attention_maps(x)[1][0, :, 0].mean(0)[1:].reshape(4, 4)
    assert panel.title == "block 1" and torch.allclose(panel.heat, expected, atol=1e-6)


def test_the_map_shows_where_one_token_looks(tmp_path):
    from vitkernels.cli.heat import panels_of

    _, model = save_tiny(tmp_path)
    x = torch.randn(1, 3, 32, 32)
    token = 1 + 1 * 4 + 3  # the class token before the patches
    (panel,) = panels_of(model, x, drawing(block=0, head=0, query=(0.99, 0.3)))
    expected = model.attention_maps(x)[0][0, 0, token, 1:].reshape(4, 4)
    assert panel.query == (1, 3) and torch.allclose(panel.heat, expected, atol=1e-6)
    (panel,) = panels_of(model, x, drawing(rollout=True, query=(1.0, 1.0)))
    assert panel.query == (3, 3) and panel.heat.shape == (4, 4)


def test_light_falls_where_the_heat_is():
    from vitkernels.cli.pictures import glowing

    heat = torch.zeros(4, 4)
    heat[1, 2] = 1
    drawn = glowing(torch.full((3, 64, 64), 0.5), heat).mean(0)
    row, column = divmod(int(drawn.argmax()), 64)
    assert row // 16 == 1 and column // 16 == 2
    assert glowing(torch.rand(3, 64, 64), torch.ones(4, 4)).isfinite().all()


def test_random_weights_are_said_to_be_random(tmp_path, capsys):
    image, out = save_photograph(tmp_path), tmp_path / "map.png"
    status, _, err = run(
        capsys, "attention-map", image, "--out", out, "--model", "vit_tiny_patch32_64"
    )
    assert status == 0 and "random weights" in err and err.count("\n") == 1
    assert picture(out).std() > 10


def test_a_failure_while_drawing_leaves_the_old_picture(tmp_path, capsys, tiny, monkeypatch):
    from vitkernels.cli import pictures

    def broken(path, *_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures, "draw", broken)
    image, out = save_photograph(tmp_path), tmp_path / "map.png"
    out.write_bytes(b"old")
    status, _, err = run(capsys, "attention-map", image, "--out", out, "--weights", tiny[0])
    assert status == 1 and "No space left" in err and err.count("\n") == 1
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["china.jpg", "map.png", "tiny.pth"]
