"""What a GPU machine needs of the package: a library built elsewhere, records of either form."""

import json
import os
import subprocess
import sys

from vitkernels import _dispatch


def test_records_name_a_backend_or_describe_it(tmp_path, monkeypatch):
    folder = tmp_path / "vitkernels"
    folder.mkdir()
    winners = {"attention": {"backend": "triton", "driver": "1"}, "linear": "cuda"}
    (folder / "records.json").write_text(json.dumps({"sm_00": winners}))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _dispatch._load_records()["sm_00"] == {"attention": "triton", "linear": "cuda"}


def test_library_built_elsewhere(tmp_path):
    code = "from vitkernels import _native as n; print(n.library_path('vitkernels_cuda')); "
    code += "print(n._load('vitkernels_cuda', '')); print(n.library_path('vitkernels_cpu').parent)"
    path = tmp_path / "elsewhere.so"
    env = os.environ | {"VITKERNELS_CUDA_LIBRARY": str(path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    where, reason, cpu = done.stdout.splitlines()
    assert where == str(path)
    assert reason == f"VITKERNELS_CUDA_LIBRARY: {path} does not exist"
    assert cpu.endswith("lib")
