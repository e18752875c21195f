"""Image files to pixels: orientation, modes, depth, and the resize and crop of timm."""

import numpy as np
import pytest
import torch
from cli_material import gradient, photograph
from PIL import Image
from vit_pairs import needs_timm

from vitkernels.cli.arguments import CROP_MODES, INTERPOLATIONS
from vitkernels.cli.images import Preprocessing, find_images, read_image
from vitkernels.cli.usage import UsageError
from vitkernels.testing import cases

ORIENTATIONS = range(1, 9)


@pytest.mark.skipif(**needs_timm)
@pytest.mark.parametrize("crop_mode", CROP_MODES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize("size", [(224, 224), (96, 160)])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(640, 427), (61, 300), (224, 224), (301, 300)])
def test_pixels_are_those_of_timms_evaluation(crop_mode, interpolation, size, crop_pct, shape):
    from timm.data.transforms_factory import transforms_imagenet_eval

    mean = (0.485, 0.456, 0.406)
    image = photograph().resize(shape)
    theirs = transforms_imagenet_eval(
        size, crop_pct, crop_mode, interpolation=interpolation, mean=mean, normalize=False
    )
    ours = Preprocessing(size, mean, (0.2,), crop_pct, crop_mode, interpolation)
    got = ours.pixels(image)
    assert got.dtype == torch.uint8 and got.shape == (3, *size)
    assert torch.equal(got, theirs(image))
    cases.record(
        "predict", "timm's transform", interpolation, (shape, size), f"{crop_mode}{crop_pct}"
    )


def test_every_interpolation_is_pillows():
    for name in INTERPOLATIONS:
        pixels = Preprocessing((32, 32), interpolation=name).pixels(gradient())
        assert pixels.shape == (3, 32, 32)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_turns_the_image_upright(tmp_path, orientation):
    upright = gradient()
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png"), upright)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.arange(0, 65536, 13, dtype=np.uint16)[:4900].reshape(70, 70)
    Image.fromarray(values).save(tmp_path / "deep.png")
    Image.fromarray(values).save(tmp_path / "deep.tif")
    for name in ("deep.png", "deep.tif"):
        image = read_image(tmp_path / name)
        assert image.mode == "RGB"
        expected = np.rint(values / 257).astype(np.uint8)
        assert np.array_equal(np.asarray(image)[..., 0], expected)


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_floats_in_a_known_range(tmp_path, scale):
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values * np.float32(scale)).save(tmp_path / "f.tif")
    got = np.asarray(read_image(tmp_path / "f.tif"))[..., 0]
    assert np.array_equal(got, np.rint(values.astype(np.float64) * 255).astype(np.uint8))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_opaque_modes_are_what_pillow_converts(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    gradient(mode=mode).save(path)
    with Image.open(path) as again:
        expected = np.asarray(again.convert("RGB"))
    assert np.array_equal(read_image(path), expected)
    assert read_image(path, in_chans=1).mode == "L"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    image = Image.new("RGBA", (8, 4), (200, 200, 200, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 4))
    if mode == "P":
        image = Image.new("P", (8, 4), 1)
        image.putpalette([0, 0, 0, 200, 200, 200])
        image.paste(0, (0, 0, 4, 4))
        image.save(tmp_path / "t.png", transparency=0)
    else:
        image.convert(mode).save(tmp_path / "t.png")
    got = np.asarray(read_image(tmp_path / "t.png"))
    assert (got[:, :4] == 255).all() and (got[:, 4:] == 200).all()


def test_half_transparent_is_mixed_with_white(tmp_path):
    Image.new("RGBA", (2, 2), (0, 100, 200, 128)).save(tmp_path / "h.png")
    got = np.asarray(read_image(tmp_path / "h.png")).astype(float)
    share = 128 / 255
    expected = share * np.array([0, 100, 200]) + (1 - share) * 255
    assert np.abs(got - expected).max() <= 1


def test_first_picture_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("#ff0000", "#00ff00")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(read_image(tmp_path / "a.gif"))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("width, height", [(1, 1), (1, 300), (400, 3)])
def test_extreme_shapes(width, height):
    for crop_mode in CROP_MODES:
        how = Preprocessing((32, 48), crop_mode=crop_mode)
        assert how.pixels(gradient(width, height)).shape == (3, 32, 48)


def test_gray_models_get_one_channel():
    assert Preprocessing((32, 32)).pixels(gradient(mode="L")).shape == (1, 32, 32)
    how = Preprocessing((32, 32), mean=(0.25,), crop_mode="border")
    pixels = how.pixels(gradient(64, 16, "L"))
    assert (pixels[0, 0] == 64).all(), "the border has the mean colour"


def test_folders_in_order_and_below(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "a.JPG", "sub/c.webp", "notes.txt"):
        (tmp_path / name).touch()
    names = [path.name for path in find_images([tmp_path])]
    assert names == ["a.JPG", "b.png", "c.webp"]
    with pytest.raises(UsageError, match="holds no image"):
        (tmp_path / "empty").mkdir()
        find_images([tmp_path / "empty"])
