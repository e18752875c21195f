"""What `vitkernels train` refuses: one line, exit status 2, and nothing is left behind."""

import json
import os

import pytest
from train_material import FOLDER, TINY, image_folder, train

BAD = {
    "no data": ((), "--data DIR|digits and --out DIR"),
    "no such folder": (("--data", "nowhere", "--out", "OUT"), "nowhere is no folder"),
    "out in use": ((*TINY, "--out", "USED"), "is not empty"),
    "nothing to resume": (("--resume", "EMPTY"), "holds no run"),
    "warm-up": (
        (*TINY, "--epochs", "2", "--warmup-epochs", "2", "--out", "OUT"),
        "--warmup-epochs",
    ),
    "min-lr": ((*TINY, "--min-lr", "1", "--out", "OUT"), "--min-lr"),
    "ema": ((*TINY, "--ema", "1", "--out", "OUT"), "--ema"),
    "mixup": ((*TINY, "--mixup", "2", "--out", "OUT"), "--mixup"),
    "lr": ((*TINY, "--lr", "nan", "--out", "OUT"), "--lr"),
    "batch": ((*TINY, "--batch", "5000", "--out", "OUT"), "--batch"),
    "accumulate": ((*TINY, "--accumulate", "9", "--out", "OUT"), "--accumulate"),
    "model": (("--data", "digits", "--model", "vit_tinny", "--out", "OUT"), "unknown model"),
    "keyword": ((*TINY, "--model-kwargs", "embed_dim", "--out", "OUT"), "KEY=VALUE"),
    "strange keyword": ((*TINY, "--model-kwargs", "colour=3", "--out", "OUT"), "colour"),
    "compare": ((*TINY, "--compare-seeds", "2", "--out", "OUT"), "--teacher"),
    "teacher": ((*TINY, "--teacher", "none.pth", "--out", "OUT"), "--teacher"),
    "image size": ((*TINY, "--image-size", "16", "--out", "OUT"), "--image-size"),
    "one class": (("--data", "ONE", "--out", "OUT"), "at least two classes"),
    "few images": (("--data", "FEW", "--out", "OUT"), "too few to hold out"),
    "out is a file": ((*TINY, "--out", "TWO/cat/0.png"), "is a file"),
    "out cannot be": ((*TINY, "--out", "/proc/run"), "--out: cannot write in /proc/run"),
    "seed": ((*TINY, "--seed", str(2**32), "--out", "OUT"), "--seed: must be below 2**32"),
    "lr of zero": ((*TINY, "--lr", "0", "--out", "OUT"), "--lr"),
    "layer decay": ((*TINY, "--layer-decay", "0", "--out", "OUT"), "--layer-decay"),
    "drop path": ((*TINY, "--drop-path", "1", "--out", "OUT"), "--drop-path"),
    "std": ((*TINY, "--std", "0", "--out", "OUT"), "std must be above 0"),
    "mean": ((*TINY, "--mean", "0.5,0.5", "--out", "OUT"), "--mean"),
    "classes": ((*TINY, "--model-kwargs", "num_classes=7", "--out", "OUT"), "class folders tell"),
    "sizes": (
        (
            *FOLDER,
            "--data",
            "TWO",
            "--image-size",
            "32",
            "--model-kwargs",
            "img_size=16",
            "--out",
            "OUT",
        ),
        "leave one of them out",
    ),
    "tested on what it trains on": (
        ("--data", "TWO", "--val-data", "TWO/../TWO", "--out", "OUT"),
        "--val-data: is the folder of --data",
    ),
    "resumed file": (("--resume", "TWO/cat/0.png"), "holds no run"),
    "strange class": (("--data", "TWO", "--val-data", "FEW", "--out", "OUT"), "which"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_usage_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "ONE", classes=("cat",))
    image_folder(tmp_path / "FEW", classes=("cat", "eel"), each=1)
    image_folder(tmp_path / "TWO")
    (tmp_path / "USED").mkdir()
    (tmp_path / "USED" / "file").touch()
    (tmp_path / "EMPTY").mkdir()
    arguments, expected = BAD[name]
    status, _, err = train(capsys, *arguments)
    assert status == 2 and len(err.strip().splitlines()) == 1, err
    assert err.startswith("vitkernels: ") and expected in err
    assert not os.path.exists("OUT")


def test_resume_refuses_other_options(tmp_path, capsys):
    out = tmp_path / "run"
    assert train(capsys, *TINY, "--epochs", "1", "--out", out)[0] == 0
    status, _, err = train(capsys, "--resume", out, "--lr", "0.1")
    assert status == 2 and "leave out --lr" in err


def test_what_was_not_said_fits_what_was(tmp_path, capsys):
    """A short run warms up shorter, a small learning rate ends lower."""
    at = TINY.index("--warmup-epochs")
    arguments = (*TINY[:at], *TINY[at + 2 :], "--epochs", "2", "--lr", "1e-6")
    status, _, err = train(capsys, *arguments, "--out", tmp_path / "run")
    assert status == 0, err
    found = json.loads((tmp_path / "run" / "options.json").read_text())
    assert found["warmup_epochs"] == 0.5 and found["min_lr"] == pytest.approx(1e-8)


def test_a_run_that_came_to_no_checkpoint_is_begun_anew(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = (*TINY, "--epochs", "1", "--out", out)
    assert train(capsys, *arguments, "--lr", "1e30", "--clip-grad", "0")[0] == 1
    assert [path.name for path in out.iterdir()] == ["options.json"]
    status, _, err = train(capsys, *arguments)
    assert status == 0, err
    assert train(capsys, *arguments)[0] == 2  # and that one is not
