"""Every Triton kernel compiled ahead of time, without a GPU: instructions, registers, spills.

`python tests/triton_ahead_of_time.py 90 main` prints the records these tests look at. The ordinary
session compiles the main settings for sm_90; sm_80, sm_100 and all settings are marked slow.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

MULTIPLIES = (
    "attention.", "linear_gelu._product", "patch_embed._forward", "patch_embed._dweight",
    "patch_embed._dimages",
    *(f"window_attention._{name}_kernel" for name in ("forward", "window", "dq", "dkv", "dbias")),
)  # fmt: skip
SHARED_LIMIT = {80: 166912, 89: 101376, 90: 232448, 100: 232448}  # bytes of one block


@pytest.fixture(scope="module")
def compiled():
    """compiled(sm, which) -> the records of one run, made once in a process of its own."""
    made = {}

    def compile_once(sm: int, which: str, *flags: str) -> dict:
        key = (sm, which, *flags)
        if key not in made:
            script = Path(__file__).with_name("triton_ahead_of_time.py")
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            command = [sys.executable, str(script), str(sm), which, *flags]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stderr[-4000:]
            made[key] = json.loads(done.stdout.splitlines()[-1])
        return made[key]

    return compile_once


def label(record: dict) -> str:
    return f"{record['kernel']} in {record['case']} for sm_{record['sm']}"


def check(records: list[dict]) -> None:
    for r in records:
        assert not r["tf32"], f"{label(r)} computes in tf32"
        assert not r["atomics"], f"{label(r)} uses {r['atomics']}"
        limit = SHARED_LIMIT[r["sm"]]
        assert r["shared"] <= limit, f"{label(r)}: {r['shared']} bytes of shared memory > {limit}"
        assert r["tensor_memory"] <= 512, f"{label(r)}: {r['tensor_memory']} tensor memory columns"
        fp32 = "torch.float32" in r["case"]  # the dtype of the product
        if r["kernel"].startswith(MULTIPLIES) and not fp32:
            assert r["mma"], f"{label(r)} does not use the tensor cores"


def test_main_settings_for_hopper_use_its_instructions_and_no_others(compiled):
    records = compiled(90, "main")["records"]
    check(records)
    for r in records:
        if r["kernel"].startswith(MULTIPLIES):
            assert r["wgmma"] == ("torch.float32" not in r["case"]), (
                f"{label(r)}: wgmma is {r['wgmma']}"
            )


def test_main_settings_for_hopper_do_not_spill(compiled):
    spilled = [
        f"{label(r)}: {r['stack']} bytes, {r['registers']} registers"
        for r in compiled(90, "main")["records"]
        if r["spills_allowed"] is not None and r["stack"] > r["spills_allowed"]
    ]
    assert not spilled, "\n".join(spilled)


def test_layer_norm_reads_sixteen_bytes_at_a_time(compiled):
    for r in compiled(90, "main")["records"]:
        norm = r["kernel"].startswith(("add_layer_norm", "patch_merge"))
        if norm and "9000" not in r["case"]:
            assert r["wide_loads"], f"{label(r)} has no 16-byte load"


def test_the_loss_reads_sixteen_bytes_at_a_time(compiled):
    """Of rows that allow it: of 1000 classes, not of 21841."""
    for r in compiled(90, "main")["records"]:
        if r["kernel"] == "distillation_loss._forward_kernel" and "21841" not in r["case"]:
            assert r["wide_loads"], f"{label(r)} has no 16-byte load"


def test_products_copy_sixteen_bytes_at_a_time(compiled):
    for r in compiled(90, "main")["records"]:
        product = r["kernel"].startswith(MULTIPLIES) and not r["kernel"].startswith("attention")
        if product and "torch.float32" not in r["case"]:
            assert r["wide_copies"], f"{label(r)} has no 16-byte copy to shared memory"


def test_every_kernel_is_reached_by_a_launcher(compiled):
    run = compiled(90, "main")
    assert {r["kernel"] for r in run["records"]} == set(run["kernels"])


@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 100])
@pytest.mark.parametrize("which", ["main", "every"])
def test_other_architectures(compiled, sm, which):
    check(compiled(sm, which)["records"])


@pytest.mark.slow
def test_every_setting_for_hopper(compiled):
    records = compiled(90, "every")["records"]
    check(records)
    spilled = [
        f"{label(r)}: {r['stack']} bytes, {r['registers']} registers"
        for r in records
        if r["spills_allowed"] is not None and r["stack"] > r["spills_allowed"]
    ]
    assert not spilled, "\n".join(spilled)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["main", "every"])
def test_single_stage_settings_fit_consumer_gpus(compiled, which):
    check(compiled(89, which, "small")["records"])
