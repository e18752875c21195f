"""The numbers of each CPU instruction-set level that this machine runs, one process per level."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from every_op import OPS_AND_BACKENDS

from vitkernels import _native
from vitkernels.testing import cases

HERE = Path(__file__).parent
MACHINE = _native.build_facts().cpu_isa()
CASES = {
    "add_layer_norm": 32,
    "layer_norm_add": 20,
    "attention": 63,
    "attention_qkvpacked": 60,
    "patch_embed": 52,
    "window_attention": 36,
    "patch_merge_layer_norm": 33,
    "linear_gelu": 49,
    "linear": 40,
    "distillation_loss": 27,
}
LEVELS = _native.CPU_ISA_LEVELS[: _native.CPU_ISA_LEVELS.index(MACHINE) + 1]


@pytest.mark.parametrize("level", LEVELS)
def test_forward_and_gradients(level, hardware_environment):
    path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(HERE / "cpu_level_cases.py")],
        env=hardware_environment | {"VITKERNELS_CPU_ISA": level, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["level"] == level
    counts = collections.Counter(op for op, *_ in report["cases"])
    assert counts == {op: n for op, n in CASES.items() if (op, "cpu") in OPS_AND_BACKENDS}
    cases.merge(report["cases"])
