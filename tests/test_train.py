"""`vitkernels train` as a user meets it: what a run leaves, how it ends, how it goes on."""

import csv
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from cli_material import run
from safetensors.torch import load_file
from train_material import FOLDER, TINY, image_folder, train

from vitkernels import FusedViT
from vitkernels.cli.train import checkpoint, study
from vitkernels.cli.train.engine import Stopped


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def last(folder):
    return folder / json.loads((folder / "last.json").read_text())["checkpoint"]


def same(a, b) -> bool:
    one, other = weights(last(a)), weights(last(b))
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_what_a_run_leaves(tmp_path, capsys):
    out = tmp_path / "run"
    status, said, err = train(capsys, *TINY, "--epochs", "3", "--out", out)
    assert status == 0, err
    rows = list(csv.DictReader((out / "log.csv").open()))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    assert json.loads((out / "log.json").read_text())[2]["val_loss"] == float(rows[2]["val_loss"])
    assert float(rows[2]["train_loss"]) < float(rows[0]["train_loss"])
    assert (out / "curves.png").stat().st_size > 10_000
    assert sorted(p.name for p in (out / "checkpoints").iterdir())[-1] == "epoch-0003"
    assert not list((out / "checkpoints").glob(".*"))
    assert f"--weights {out}" in said


def test_the_weights_are_those_of_the_best_epoch_and_predict_reads_them(tmp_path, capsys):
    data, out = image_folder(tmp_path / "data"), tmp_path / "run"
    arguments = (*FOLDER, "--epochs", "4", "--lr", "0.01", "--data", data, "--out", out)
    status, _, err = train(capsys, *arguments)
    assert status == 0, err
    rows = json.loads((out / "log.json").read_text())
    best = max(rows, key=lambda row: (row["val_accuracy"], -row["val_loss"]))["epoch"]
    named = json.loads((out / "best.json").read_text())["checkpoint"]
    assert named == f"checkpoints/epoch-{best:04d}"
    assert all(torch.equal(weights(out)[k], v) for k, v in weights(out / named).items()), (
        "the run's weights are not the best checkpoint's"
    )
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    FusedViT(num_classes=2, **settings).load_state_dict(weights(out))
    status, said, err = run(capsys, "predict", data / "cat" / "0.png", "--weights", out, "--json")
    assert status == 0, err
    found = json.loads(said)[0]["predictions"]
    assert {p["label"] for p in found} == {"cat", "dog"}


def test_a_folder_is_learned(tmp_path, capsys):
    """Bright against dark pictures: whoever confuses labels, pixels or splits stays at a half."""
    data = image_folder(tmp_path / "data", each=24)
    arguments = (*FOLDER, "--batch", "4", "--epochs", "6", "--lr", "0.01", "--val-fraction", "0.25")
    status, _, err = train(capsys, *arguments, "--data", data, "--out", tmp_path / "run")
    assert status == 0, err
    assert json.loads((tmp_path / "run" / "log.json").read_text())[-1]["val_accuracy"] >= 0.9


# --- going on -------------------------------------------------------------------------------------

ALL_STATE = ("--ema", "0.9", "--mixup", "0.4", "--erase", "0.3", "--drop-path", "0.2")


def spawn(*arguments):
    command = [sys.executable, "-m", "vitkernels", "train", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


@pytest.mark.parametrize("options", [(), ALL_STATE], ids=["plain", "with everything that draws"])
def test_killed_and_resumed_equals_undisturbed(tmp_path, capsys, options):
    """SIGKILL at a random moment after the first epoch: the same bits at the end."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = (*TINY, *options, "--epochs", "8")
    process = spawn(*arguments, "--out", killed)
    wait_for((killed / "last.json").exists, process)
    time.sleep(torch.rand(()).item() * 0.3)
    process.kill()
    process.communicate()
    done = last(killed).name
    assert done < "epoch-0008", "the run ended before it was killed"
    assert train(capsys, *arguments, "--out", whole)[0] == 0
    status, said, err = train(capsys, "--resume", killed)
    assert status == 0 and f"going on after {done}" in said, err
    assert same(whole, killed)
    rows = [json.loads((folder / "log.json").read_text()) for folder in (whole, killed)]
    assert [r["train_loss"] for r in rows[0]] == [r["train_loss"] for r in rows[1]]


def test_ctrl_c_saves_in_the_middle_of_an_epoch(tmp_path, capsys):
    whole, halted = tmp_path / "whole", tmp_path / "halted"
    arguments = (*TINY, *ALL_STATE, "--batch", "32", "--epochs", "3")
    process = spawn(*arguments, "--out", halted)
    wait_for((halted / "last.json").exists, process)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "vitkernels: interrupted after step" in err and f"--resume {halted}" in err
    assert len(err.strip().splitlines()) == 1, err
    assert "-step-" in last(halted).name
    assert train(capsys, "--resume", halted)[0] == 0
    assert train(capsys, *arguments, "--out", whole)[0] == 0
    assert same(whole, halted)


def test_a_finished_run_resumed_changes_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    assert train(capsys, *TINY, "--epochs", "1", "--out", out)[0] == 0
    before = weights(out)
    assert train(capsys, "--resume", out)[0] == 0
    assert all(torch.equal(before[k], v) for k, v in weights(out).items())


def test_workers_change_no_number(tmp_path, capsys):
    data = image_folder(tmp_path / "data")
    for workers in (0, 2):
        arguments = (*FOLDER, "--workers", workers, "--data", data)
        assert train(capsys, *arguments, "--out", tmp_path / str(workers))[0] == 0
    assert same(tmp_path / "0", tmp_path / "2")


def test_accumulated_batches_equal_a_large_one(tmp_path, capsys):
    for name, batch, accumulate in (("large", 256, 1), ("small", 64, 4)):
        arguments = (*TINY, "--batch", batch, "--accumulate", accumulate, "--epochs", "1")
        assert train(capsys, *arguments, "--out", tmp_path / name)[0] == 0
    for name, one in weights(tmp_path / "large").items():
        other = weights(tmp_path / "small")[name]
        assert (one - other).norm() <= 1e-3 * one.norm().clamp(min=1e-3), name


# --- when something is wrong ----------------------------------------------------------------------


def test_bad_images_stop_the_run_or_are_counted(tmp_path, capsys):
    data = image_folder(tmp_path / "data", each=8)
    (data / "cat" / "3.png").write_bytes(b"not an image")
    damaged = (data / "dog" / "5.png").read_bytes()
    (data / "dog" / "5.png").write_bytes(damaged[: len(damaged) // 2])
    status, _, err = train(capsys, *FOLDER, "--data", data, "--out", tmp_path / "one")
    assert status == 2 and len(err.splitlines()) == 1
    assert ".png" in err and "--skip-bad" in err
    arguments = (*FOLDER, "--data", data, "--skip-bad", "--epochs", "2", "--out", tmp_path / "two")
    status, said, err = train(capsys, *arguments)
    assert status == 0, err
    assert "2 bad images left out" in said
    assert [r["bad_images"] for r in json.loads((tmp_path / "two/log.json").read_text())] == [2, 2]


def test_a_loss_that_is_no_number_stops(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = (*TINY, "--epochs", "6", "--lr", "1e30", "--clip-grad", "0", "--out", out)
    status, _, err = train(capsys, *arguments)
    assert status == 1 and len(err.splitlines()) == 1
    assert "the loss is nan at step" in err or "the loss is inf at step" in err
    assert "last good one is" in err or "there is no earlier checkpoint" in err
    if (out / "last.json").exists():
        assert all(v.isfinite().all() for v in weights(last(out)).values())


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, capsys, monkeypatch):
    out, real, calls = tmp_path / "run", torch.save, []

    def save(state, path):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(state, path)

    monkeypatch.setattr(checkpoint.torch, "save", save)
    status, _, err = train(capsys, *TINY, "--epochs", "4", "--out", out)
    assert status == 1 and len(err.splitlines()) == 1
    assert "No space left on device" in err and "epoch-0002" in err and f"--resume {out}" in err
    assert not list((out / "checkpoints").glob(".*"))
    monkeypatch.undo()
    assert train(capsys, "--resume", out)[0] == 0
    assert last(out).name == "epoch-0004"


def test_a_damaged_checkpoint_is_one_sentence(tmp_path, capsys):
    out = tmp_path / "run"
    assert train(capsys, *TINY, "--epochs", "1", "--out", out)[0] == 0
    path = last(out) / "state.pt"
    path.write_bytes(path.read_bytes()[:100])
    status, _, err = train(capsys, "--resume", out)
    assert status == 2 and "is damaged" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "options",
    [
        ("--amp", "bf16", "--grad-checkpointing"),
        ("--amp", "fp16"),
        ("--layer-decay", "0.7", "--cutmix", "1", "--label-smoothing", "0.1"),
        ("--model", "swin_tiny_patch4_window7_224", "--model-kwargs", "img_size=8", "patch_size=2",
         "embed_dim=16", "depths=(1,1)", "num_heads=(1,2)", "window_size=2"),
    ],
    ids=["bf16", "fp16", "timm's", "swin"],
)  # fmt: skip
def test_options_train(tmp_path, capsys, options):
    out = tmp_path / "run"
    arguments = (*TINY, "--lr", "0.003", "--epochs", "4", *options, "--out", out)
    status, _, err = train(capsys, *arguments)
    assert status == 0, err
    rows = json.loads((out / "log.json").read_text())
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]


# --- distillation ---------------------------------------------------------------------------------


def test_a_study_trains_teacher_and_students_and_reports(tmp_path, capsys):
    out = tmp_path / "study"
    arguments = (*TINY, "--epochs", "1", "--teacher", "cnn", "--teacher-epochs", "1")
    status, said, err = train(capsys, *arguments, "--compare-seeds", "2", "--out", out)
    assert status == 0, err
    report = json.loads((out / "report.json").read_text())
    assert [r["seed"] for r in report["runs"]] == [0, 1]
    for r in report["runs"]:
        for way in ("alone", "taught"):
            rows = json.loads((out / f"seed-{r['seed']}-{way}" / "log.json").read_text())
            assert rows[-1]["val_accuracy"] == r[way]
        assert r["difference"] == r["taught"] - r["alone"]
        loads = [weights(out / f"seed-{r['seed']}-{way}") for way in ("alone", "taught")]
        assert any(not torch.equal(loads[0][k], loads[1][k]) for k in loads[0])
    assert report["teacher"]["accuracy"] > 0.25
    assert "over all seeds" in said and "over all seeds" in (out / "report.md").read_text()


def test_an_interrupted_study_goes_on(tmp_path, capsys, monkeypatch):
    out, real, calls = tmp_path / "study", study.train, []

    def stopped(o, *rest):
        calls.append(o.out)
        if len(calls) == 2:
            raise Stopped(f"interrupted: go on with vitkernels train --resume {o.out}")
        return real(o, *rest)

    monkeypatch.setattr(study, "train", stopped)
    arguments = (*TINY, "--epochs", "1", "--teacher", "cnn", "--teacher-epochs", "1")
    status, _, err = train(capsys, *arguments, "--compare-seeds", "1", "--out", out)
    assert status == 130 and err == (
        f"vitkernels: interrupted: go on with vitkernels train --resume {out}\n"
    )
    first = weights(out / "seed-0-alone")
    monkeypatch.undo()
    status, said, err = train(capsys, "--resume", out)
    assert status == 0 and "over all seeds" in said, err
    assert all(torch.equal(first[k], v) for k, v in weights(out / "seed-0-alone").items())


@pytest.mark.parametrize("student", ["deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224"])
def test_a_checkpoint_teaches_and_the_run_goes_on(tmp_path, capsys, student):
    """The teacher of a resumed run is the same; a distilled student trains both its heads."""
    teacher, whole, halted = tmp_path / "teacher", tmp_path / "whole", tmp_path / "halted"
    assert train(capsys, *TINY, "--epochs", "2", "--out", teacher)[0] == 0
    arguments = list(TINY)
    arguments[3:5] = [student, "--model-kwargs", "img_size=8", "patch_size=4"]
    arguments += ["--epochs", "3", "--teacher", teacher, "--distill", "hard"]
    assert train(capsys, *arguments, "--out", whole)[0] == 0
    assert train(capsys, *arguments, "--out", halted)[0] == 0
    (halted / "last.json").write_text(json.dumps({"checkpoint": "checkpoints/epoch-0002"}))
    assert train(capsys, "--resume", halted)[0] == 0
    assert same(whole, halted)
    if "distilled" in student:
        moments = torch.load(last(whole) / "state.pt", weights_only=True)["moments"]
        assert moments["head_dist.weight"]["exp_avg"].abs().max() > 0


def test_a_teacher_of_other_classes_is_refused(tmp_path, capsys):
    model = FusedViT(img_size=8, patch_size=4, in_chans=1, num_classes=3, embed_dim=64, depth=1,
                     num_heads=1)  # fmt: skip
    torch.save(model.state_dict(), tmp_path / "three.pth")
    arguments = (*TINY, "--teacher", tmp_path / "three.pth", "--out", tmp_path / "run")
    status, _, err = train(capsys, *arguments)
    assert status == 2 and "has 3 classes, the data have 10" in err
    assert not (tmp_path / "run").exists()
