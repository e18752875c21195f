"""Bad usage: one line that says what to do, exit status 2, no traceback, nothing half-written."""

import functools
import pickle

import numpy as np
import pytest
import torch
from cli_material import CLASSES, gradient, run, save_tiny, save_tiny_swin
from PIL import Image
from vit_pairs import timm

from vitkernels import _native
from vitkernels.cli import usage


@functools.cache
def tiny_bytes(**settings) -> bytes:
    """A checkpoint's bytes: made once."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        return save_tiny(Path(folder), **settings)[0].read_bytes()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with good and bad files, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    gradient().save("good.png")
    gradient(300, 300).save("good.jpg")
    whole = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("this is no picture\n" * 40)
    (tmp_path / "empty.png").touch()
    wide = np.linspace(-1000, 3000, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(wide).save("range.tif")
    (tmp_path / "folder").mkdir()
    (tmp_path / "model.pth").write_bytes(tiny_bytes())
    (tmp_path / "headless.pth").write_bytes(tiny_bytes(num_classes=0))
    (tmp_path / "cut.pth").write_bytes(tiny_bytes()[:5000])
    (tmp_path / "text.pth").write_text("weights")
    (tmp_path / "weights.txt").write_text("weights")
    torch.save({"layer1.0.conv1.weight": torch.zeros(2, 2, 3, 3)}, "resnet.pth")
    save_tiny_swin(tmp_path, "swin.pth")
    torch.save({"something.weight": torch.zeros(2)}, "other.pth")
    torch.save([1, 2, 3], "list.pth")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(functools.partial(print, "run")))
    (tmp_path / "seven.txt").write_text("".join(f"{i}\n" for i in range(CLASSES)))
    (tmp_path / "six.txt").write_text("".join(f"{i}\n" for i in range(6)))
    (tmp_path / "broken.json").write_text('["a", "b"')
    (tmp_path / "gaps.json").write_text('{"0": "a", "2": "b"}')
    (tmp_path / "binary.txt").write_bytes(bytes(range(128, 256)))
    (tmp_path / "configured").mkdir()
    (tmp_path / "configured" / "model.pth").write_bytes(tiny_bytes())
    (tmp_path / "configured" / "preprocessor_config.json").write_text("{")
    return tmp_path


WEIGHTS = "--weights model.pth"
SWIN = "--weights swin.pth"
# arguments: what the line must say
PREDICT = {
    "": "the following arguments are required: IMAGE",
    "good.png": "predict needs --weights FILE",
    f"absent.png {WEIGHTS}": "absent.png does not exist",
    f"god.png {WEIGHTS}": "did you mean good.png",
    f"nowhere/good.png {WEIGHTS}": "its folder nowhere does not exist either",
    f"folder {WEIGHTS}": "the folder folder holds no image",
    f"text.jpg {WEIGHTS}": "text.jpg is not an image that Pillow can read",
    f"empty.png {WEIGHTS}": "empty.png is not an image that Pillow can read",
    f"cut.jpg {WEIGHTS}": "cut.jpg is damaged or incomplete",
    f"cut.png {WEIGHTS}": "cut.png is damaged or incomplete",
    f"good.png cut.jpg {WEIGHTS}": "cut.jpg is damaged or incomplete",
    f"range.tif {WEIGHTS}": "convert it to 8 bits first",
    "good.png --weights absent.pth": "--weights: absent.pth does not exist",
    "good.png --weights model.pht": "did you mean model.pth",
    "good.png --weights weights.txt": "weights.txt must end in .safetensors, .pth",
    "good.png --weights text.pth": "text.pth is not readable as a PyTorch checkpoint",
    "good.png --weights cut.pth": "cut.pth is not readable as a PyTorch checkpoint",
    "good.png --weights code.pth": "code.pth",
    "good.png --weights list.pth": "list.pth must hold a dict of tensors",
    "good.png --weights resnet.pth": "resnet.pth is a ResNet",
    "good.png --weights other.pth": "other.pth must have the names of a Vision Transformer",
    "good.png --weights folder": "folder",
    "good.png --weights headless.pth": "headless.pth has no classifier",
    "good.png --weights configured/model.pth": "preprocessor_config.json beside the weights cannot",
    f"good.png {WEIGHTS} --model vit_smal_patch16_224": "did you mean vit_small_patch16_224",
    f"good.png {WEIGHTS} --model vit_small_patch16_224": "the width is 64 where 384 is expected",
    f"good.png {SWIN} --model vit_small_patch16_224": "swin.pth is a Swin Transformer: name its",
    f"good.png {WEIGHTS} --model swin_tiny_patch4_window7_224": "model.pth is a Vision Transformer",
    f"good.png {SWIN} --model swin_tiny_patch4_window7_224": "the width is 32 where 96 is expected",
    f"good.png {SWIN} --model swin_tiny_patch4_windw7_224": "did you mean swin_tiny_patch4_window7",
    f"good.png {SWIN} --model swin_tiny_patch4_window7_224 --image-size 3": "--image-size: Patch",
    f"good.png {SWIN} --image-size 3": "--image-size: swin.pth: PatchEmbed: img_size must be",
    f"good.png {SWIN} --labels six.txt": "names 6 classes, the weights have 7",
    f"good.png {WEIGHTS} --image-size 7": "--image-size: model.pth: PatchEmbed: img_size must be",
    f"good.png {WEIGHTS} --labels absent.txt": "--labels: absent.txt does not exist",
    f"good.png {WEIGHTS} --labels six.txt": "names 6 classes, the weights have 7",
    f"good.png {WEIGHTS} --labels broken.json": "broken.json is not valid JSON",
    f"good.png {WEIGHTS} --labels gaps.json": "must number its names from 0 on",
    f"good.png {WEIGHTS} --labels binary.txt": "binary.txt is not a text file",
    f"good.png {WEIGHTS} --labels folder": "folder is a folder: name a file",
    f"good.png {WEIGHTS} --topk 0": "--topk: must be a positive whole number, got '0'",
    f"good.png {WEIGHTS} --batch two": "--batch: must be a positive whole number",
    f"good.png {WEIGHTS} --mean 0.1,0.2": "--mean: the model takes 3 channels, got 2",
    f"good.png {WEIGHTS} --mean gray": "--mean: must be one number, or one for each channel",
    f"good.png {WEIGHTS} --std 0": "--std: must be above 0",
    f"good.png {WEIGHTS} --crop-pct 1.5": "--crop-pct: must be above 0 and at most 1",
    f"good.png {WEIGHTS} --crop-mode left": "--crop-mode: invalid choice",
    f"good.png {WEIGHTS} --interpolation cubic": "--interpolation: invalid choice",
    f"good.png {WEIGHTS} --dtype int8": "--dtype: invalid choice",
    f"good.png {WEIGHTS} --device cuda": "--device cuda: no NVIDIA GPU is visible",
    f"good.png {WEIGHTS} --threads 0": "--threads: must be a positive whole number",
}
ATTENTION_MAP = {
    "good.png": "the following arguments are required: --out",
    "good.png good.jpg --out a.png": "unrecognized arguments: good.jpg",
    "absent.png --out a.png": "IMAGE: absent.png does not exist",
    f"text.jpg --out a.png {WEIGHTS}": "text.jpg is not an image",
    f"good.png --out nowhere/a.png {WEIGHTS}": "--out: the folder nowhere does not exist: mkdir",
    f"good.png --out folder {WEIGHTS}": "--out: folder is a folder: name a file in it",
    f"good.png --out good.png {WEIGHTS}": "--out: good.png is the image itself",
    f"good.png --out a.txt {WEIGHTS}": "--out: a.txt must end in .png",
    f"good.png --out /proc/a.png {WEIGHTS}": "--out: cannot write in /proc",
    f"good.png --out a.png {WEIGHTS} --block 2": "--block: the model has the blocks 0 to 1, got 2",
    f"good.png --out a.png {WEIGHTS} --block -3": "--block: the model has the blocks 0 to 1",
    f"good.png --out a.png {WEIGHTS} --head 1": "--head: the model has the heads 0 to 0, got 1",
    f"good.png --out a.png {WEIGHTS} --head max": "--head: must be a head's number, mean or all",
    f"good.png --out a.png {WEIGHTS} --rollout --block 1": "--rollout is over all blocks and heads",
    f"good.png --out a.png {WEIGHTS} --rollout --head 0": "--rollout is over all blocks and heads",
    "good.png --out a.png --weights resnet.pth": "resnet.pth is a ResNet",
    f"good.png --out a.png {WEIGHTS} --stage 0": "--stage: a ViT has no stages: name a --block",
    f"good.png --out a.png {SWIN} --stage 2": "--stage: the model has the stages 0 to 1, got 2",
    f"good.png --out a.png {SWIN} --stage 0 --block 0": "--stage is of all its blocks",
    f"good.png --out a.png {SWIN} --block 4": "--block: the model has the blocks 0 to 3, got 4",
    f"good.png --out a.png {SWIN} --head 1": "--head: block 0 has the heads 0 to 0, got 1",
    f"good.png --out a.png {SWIN} --stage 1 --head 2": "--head: block 2 has the heads 0 to 1",
    f"good.png --out a.png {SWIN} --rollout": "--rollout: the windows of a Swin have no rollout",
    f"good.png --out a.png {SWIN} --query 0.5": "--query: must be X,Y from 0,0",
    f"good.png --out a.png {SWIN} --query 0.5,1.5": "--query: must be X,Y from 0,0",
    "good.png --out a.png --model vit_hug_patch14_224": "did you mean vit_huge_patch14_224",
}
CHECK = {
    "--batch 0": "--batch: must be a positive whole number",
    "--dtype fp32": "--dtype: must be of float32, bfloat16, float16",
    "--dtype float32,": "--dtype: must be of float32, bfloat16, float16",
    "--backend opencl": "--backend: invalid choice",
    "--device cuda": "--device cuda: no NVIDIA GPU is visible",
}
CHECK_WITH_TIMM = {
    "--model vit_small_pach16_224": "did you mean vit_small_patch16_224",
    "--model zzz": "unknown model 'zzz': one of them is vit_tiny_patch16_224",
    "--model resnet18": "--model resnet18: from_timm: the model ResNet is not supported",
    "--model swinv2_cr_tiny_224": "swinv2_cr_tiny_224: from_timm: the model SwinTr",
    "--model swin_tiny_patch4_window7_224 --image-size 2": "--image-size: 2x2 pixels are less than",
    "--model swin_tiny_patch4_window7_224 --weights model.pth": "model.pth is a Vision Transformer",
    "--model swin_tiny_patch4_window7_224 --weights swin.pth": "the width is 32 where 96 is",
    "--model vit_tiny_patch16_224 --image-size 4": "4x4 pixels are less than one patch of 16x16",
    "--model vit_tiny_patch16_224 --weights resnet.pth": "resnet.pth is a ResNet",
    "--model vit_tiny_patch16_224 --weights model.pth": "the width is 64 where 192 is expected",
}
BENCH = {
    "--csv nowhere/a.csv": "--csv: the folder nowhere does not exist",
    "--csv folder": "--csv: folder is a folder",
    "--csv a.txt": "--csv: a.txt must end in .csv",
    "--json a.csv": "--json: a.csv must end in .json",
    "--json /dev/null": "--json: /dev/null is not a regular file",
    "--model vit_smll_patch16_224": "did you mean vit_small_patch16_224",
    "--model swin_tny_patch4_window7_224": "did you mean swin_tiny_patch4_window7_224",
    "--dtype float16": "--dtype float16 trains on a GPU only: add --forward",
    "--seconds 0": "--seconds: must be a positive whole number",
    "--batch -1": "--batch: must be a positive whole number",
    "--train more": "unrecognized arguments: more",
}
COMMANDS = {"predict": PREDICT, "attention-map": ATTENTION_MAP, "check": CHECK, "bench": BENCH}
if timm is not None:
    COMMANDS["check"] = CHECK | CHECK_WITH_TIMM
EVERY = [(command, words, said) for command, of in COMMANDS.items() for words, said in of.items()]


@pytest.mark.parametrize("command, words, said", EVERY, ids=[f"{c} {w}" for c, w, _ in EVERY])
def test_one_line_and_status_2(place, capsys, command, words, said):
    before = sorted(place.rglob("*"))
    status, out, err = run(capsys, command, *words.split())
    assert status == 2, (out, err)
    assert err.startswith("vitkernels: ") and err.count("\n") == 1, err
    assert said in err
    assert out == "" or command in ("check", "bench"), out
    assert "Traceback" not in err and len(err) < 500
    assert sorted(place.rglob("*")) == before, "something was left behind"


def test_there_are_enough_of_them():
    assert len(EVERY) >= 85


EXTRAS = {
    "predict x.png --weights y.pth": ("PIL", "pillow", "cli"),
    "attention-map x.png --out a.png": ("matplotlib", "matplotlib", "cli"),
    "check": ("rich", "rich", "cli"),
    "bench": ("rich", "rich", "cli"),
    "demo": ("sklearn", "scikit-learn", "demo"),
}


@pytest.mark.parametrize("words", EXTRAS)
def test_a_missing_package_is_one_line(capsys, monkeypatch, words):
    module, package, extra = EXTRAS[words]
    monkeypatch.setattr(usage, "installed", lambda name: name != module)
    status, out, err = run(capsys, *words.split())
    assert status == 2 and out == "" and err.count("\n") == 1
    assert f"pip install 'vitkernels[{extra}]'" in err and package in err


def test_check_without_timm(capsys, monkeypatch):
    from vitkernels.cli import timm_peer

    monkeypatch.setattr(timm_peer, "import_timm", lambda: None)
    status, out, err = run(capsys, "check")
    assert status == 2 and out == "" and err.count("\n") == 1
    assert "pip install 'vitkernels[timm]'" in err


def test_unknown_model_without_timm_names_ours(capsys, monkeypatch, place):
    from vitkernels.cli import naming

    monkeypatch.setattr(naming, "import_timm", lambda: None)
    words = "attention-map good.png --out a.png --model vit_base_patch16_xp_224"
    status, _, err = run(capsys, *words.split())
    assert status == 2 and "vit_base_patch16_224" in err and "timm, which knows more" in err


@pytest.mark.parametrize("command", ["check", "bench"])
def test_a_backend_that_is_not_here(capsys, monkeypatch, command):
    monkeypatch.setitem(_native.missing, "cuda", "no NVIDIA GPU is visible to torch")
    status, _, err = run(capsys, command, "--backend", "cuda")
    assert status == 2 and "--backend cuda: no NVIDIA GPU is visible" in err


@pytest.mark.parametrize("command", ["predict", "attention-map", "check", "bench", "info", "demo"])
def test_help_of_every_command(capsys, command):
    with pytest.raises(SystemExit) as stop:
        run(capsys, command, "--help")
    assert stop.value.code == 0
    assert f"vitkernels {command}" in capsys.readouterr().out


def test_help_imports_nothing_heavy(capsys):
    """In a process of its own: `vitkernels --help` needs torch only."""
    import subprocess
    import sys

    heavy = ("PIL", "matplotlib", "rich", "timm", "sklearn", "torchvision", "triton")
    code = (
        "import sys\nfrom vitkernels import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        f"found = [m for m in {heavy!r} if m in sys.modules]\n"
        "sys.exit(f'imported {found}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_out_of_memory_is_one_line(capsys, monkeypatch):
    from vitkernels.cli import info

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    monkeypatch.setattr(info, "print_info", full)
    status, _, err = run(capsys, "info")
    assert status == 1 and err.count("\n") == 1 and "lower --batch" in err
