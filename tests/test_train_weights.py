"""What `vitkernels train` leaves is loaded as the model that was trained, whatever it was."""

import dataclasses
import json

import pytest
import torch
from cli_material import gradient, run
from safetensors.torch import save_file

from vitkernels.cli import naming
from vitkernels.cli.train import prepare
from vitkernels.cli.train.options import Options

VIT = {"patch_size": 4, "depth": 1}
SWIN = {"patch_size": 2, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 1)}
MODELS = {  # with what neither names nor shapes tell
    "default": (None, {}),
    "heads of the name": ("vit_tiny_patch4_8", {**VIT, "embed_dim": 96}),
    "pooling": (
        "vit_tiny_patch4_8",
        {**VIT, "embed_dim": 64, "num_heads": 4, "global_pool": "max"},
    ),
    "deit": ("deit_tiny_distilled_patch16_224", {**VIT, "embed_dim": 48, "num_heads": 2}),
    "hybrid": ("vit_tiny_r_s16_p8_224", {"patch_size": 1, "depth": 1, "embed_dim": 48}),
    "swin": ("swin_tiny_patch4_window7_224", {**SWIN, "window_size": 3, "pad_mode": "timm"}),
    "swin v2": ("swinv2_tiny_window8_256", {**SWIN, "window_size": 2}),
}


def saved(o: Options, folder):
    """The model of a run, and the folder of its weights."""
    folder.mkdir()
    _, model, config = prepare(o)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config))
    return model.eval()


def check_loads(model, folder) -> None:
    loaded = naming.load_model(None, folder)
    assert type(loaded) is type(model)
    x = torch.randint(0, 256, (2, model.in_chans, 8, 8), dtype=torch.uint8)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("name", MODELS)
def test_the_model_comes_back(tmp_path, name):
    model, settings = MODELS[name]
    o = Options(data="digits", model=model, model_kwargs=settings, out=str(tmp_path))
    check_loads(saved(o, tmp_path / "run"), tmp_path / "run")


@pytest.mark.parametrize("name", ["pooling", "deit", "swin"])
def test_a_run_that_began_with_anothers_weights_keeps_its_arguments(tmp_path, name):
    """--weights FOLDER without --model: all of it is as in that folder."""
    for label in ("dark", "bright"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for k in range(2):
            gradient(8 + k, 8).save(tmp_path / "data" / label / f"{k}.png")
    model, settings = MODELS[name]
    o = Options(data=str(tmp_path / "data"), out=str(tmp_path), model=model, image_size=8)
    first, second = tmp_path / "first", tmp_path / "second"
    before = saved(dataclasses.replace(o, model_kwargs=settings), first)
    after = saved(dataclasses.replace(o, model=None, image_size=None, weights=str(first)), second)
    assert type(before) is type(after)
    check_loads(after, second)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, second)]
    assert configs[0] == configs[1]


def test_default_digits_are_predicted(tmp_path, capsys):
    """The README's commands, one after the other."""
    from PIL import Image
    from sklearn.datasets import load_digits

    picture = load_digits().images[0]
    Image.fromarray((picture * 15).astype("uint8")).resize((64, 64)).save(tmp_path / "0.png")
    arguments = ("--data", "digits", "--epochs", "1", "--warmup-epochs", "0", "--threads", "1")
    status, _, err = run(capsys, "train", *arguments, "--out", tmp_path / "run")
    assert status == 0, err
    status, said, err = run(capsys, "predict", tmp_path / "0.png", "--weights", tmp_path / "run")
    assert status == 0 and "probability" in said, err
