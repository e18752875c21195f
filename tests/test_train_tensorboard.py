"""The events of `vitkernels train` for TensorBoard: what it reads is what the log says."""

import json
import shutil
import sys

import pytest
from train_material import TINY, train

from vitkernels.cli import usage
from vitkernels.cli.train import journal


def trained(capsys, *arguments) -> str:
    status, said, err = train(capsys, *arguments)
    assert status == 0, err
    return said


def check_events(out) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    seen = events.EventAccumulator(str(out / "tensorboard"))
    seen.Reload()
    rows = json.loads((out / "log.json").read_text())
    names = ("train_loss", "val_loss", "val_accuracy", "lr", "images_per_second")
    assert sorted(seen.Tags()["scalars"]) == sorted(names)
    for name in names:
        found = {event.step: event.value for event in seen.Scalars(name)}
        assert found == pytest.approx({row["epoch"]: row[name] for row in rows}, rel=1e-6), name


@pytest.mark.skipif(not usage.installed("tensorboard"), reason="tensorboard is not installed")
def test_events_are_the_log_also_after_a_lost_epoch(tmp_path, capsys):
    out = tmp_path / "run"
    trained(capsys, *TINY, "--epochs", "3", "--out", out)
    check_events(out)
    shutil.rmtree(out / "checkpoints" / "epoch-0003")  # a kill before it was complete
    (out / "last.json").write_text(json.dumps({"checkpoint": "checkpoints/epoch-0002"}))
    trained(capsys, "--resume", out)
    check_events(out)


def test_without_tensorboard_nothing_is_missed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(journal, "installed", lambda module: module != "tensorboard")
    said = trained(capsys, *TINY, "--epochs", "1", "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists() and "TensorBoard" not in said


def test_a_tensorboard_that_cannot_be_imported_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(journal, "installed", lambda module: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said = trained(capsys, *TINY, "--epochs", "1", "--out", tmp_path / "run")
    assert [line for line in said.splitlines() if "TensorBoard" in line] == [
        "  no events for TensorBoard, which cannot be imported: "
        "import of torch.utils.tensorboard halted; None in sys.modules"
    ]
    assert (tmp_path / "run" / "log.json").exists()
