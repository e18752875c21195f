"""Choosing a backend: what auto takes, that a request never falls back, and what a refusal says."""

import pytest
import torch

import vitkernels
from vitkernels import _dispatch, _native, ops, use_backend
from vitkernels._dispatch import Backend, choose
from vitkernels.ops.add_layer_norm import BACKENDS

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
F32 = (torch.float32,)


@pytest.fixture
def every_backend_present(monkeypatch):
    """As on a machine with a GPU and every library."""
    monkeypatch.setattr(_native, "missing", dict.fromkeys(_dispatch.BACKEND_NAMES))
    on_device = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",)}
    monkeypatch.setattr(_native, "devices", {**_native.devices, **on_device})


def test_auto_takes_the_cpp_kernel_on_cpu(every_backend_present):
    assert choose("add_layer_norm", BACKENDS, None, CPU, F32) == "auto"


def test_auto_without_the_cpp_library_takes_stock_torch(monkeypatch):
    monkeypatch.setitem(_native.missing, "cpu", "not built")
    assert choose("add_layer_norm", BACKENDS, None, CPU, F32) == "torch"


def test_float64_goes_to_the_reference(every_backend_present):
    for device in (CPU, CUDA):
        assert choose("add_layer_norm", BACKENDS, None, device, (torch.float64,)) == "reference"


def test_auto_on_a_gpu_needs_a_hardware_record(every_backend_present, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(_dispatch, "_hinted", False)
    with pytest.warns(UserWarning, match="no kernel has a hardware record for sm_90"):
        assert choose("add_layer_norm", BACKENDS, None, CUDA, F32, sizes=(768,)) == "torch"
    won = {"forward+backward fp32 C<=1024": "triton"}
    monkeypatch.setattr(_dispatch, "_RECORDS", {"sm_90": {"add_layer_norm": won}})
    assert choose("add_layer_norm", BACKENDS, None, CUDA, F32, sizes=(768,)) == "triton"
    assert choose("add_layer_norm", BACKENDS, None, CUDA, F32, sizes=(4096,)) == "torch"
    assert choose("layer_norm_add", BACKENDS, None, CUDA, F32, sizes=(768,)) == "torch"


def test_a_request_is_served_or_refused_with_every_reason(monkeypatch):
    monkeypatch.setitem(_native.missing, "triton", "no GPU here")
    with pytest.raises(ValueError) as caught:
        choose("add_layer_norm", BACKENDS, "triton", CPU, F32)
    text = str(caught.value)
    assert "add_layer_norm: backend='triton' cannot serve this call: no GPU here" in text
    for other in ("cpu:", "cuda:", "torch: can serve it", "reference: can serve it"):
        assert other in text


def test_a_limit_is_a_reason(every_backend_present):
    table = (Backend("cpu", limit=lambda D: f"D is {D}" if D > 8 else None), Backend("torch"))
    assert choose("op", table, None, CPU, F32, D=8) == "auto"
    assert choose("op", table, None, CPU, F32, D=9) == "torch"
    with pytest.raises(ValueError, match="D is 9"):
        choose("op", table, "cpu", CPU, F32, D=9)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"use_backend: name must be one of .*got 'gpu'"):
        use_backend("gpu")
    with pytest.raises(ValueError, match=r"add_layer_norm: backend must be one of .*got 'gpu'"):
        ops.add_layer_norm(torch.ones(2, 4), None, None, None, backend="gpu")


def test_use_backend_nests_and_gives_the_choice_back():
    with use_backend("reference"):
        assert choose("add_layer_norm", BACKENDS, None, CPU, F32) == "reference"
        with use_backend("torch"):
            assert choose("add_layer_norm", BACKENDS, None, CPU, F32) == "torch"
            assert choose("add_layer_norm", BACKENDS, "reference", CPU, F32) == "reference"
        with use_backend("auto"):
            assert _dispatch._forced is None
        assert choose("add_layer_norm", BACKENDS, None, CPU, F32) == "reference"
    assert _dispatch._forced is None


def test_use_backend_gives_the_choice_back_after_an_error():
    with pytest.raises(RuntimeError, match="inside"), use_backend("torch"):
        raise RuntimeError("inside")
    assert _dispatch._forced is None


def test_use_backend_recompiles_a_compiled_function():
    x = torch.randn(2, 3, 8)
    compiled = torch.compile(
        lambda x: ops.add_layer_norm(x, None, None, None)[0], backend="aot_eager", fullgraph=True
    )
    with use_backend("torch"):
        first = compiled(x)
    with use_backend("reference"):
        second = compiled(x)
    torch.testing.assert_close(first, second)


def test_available_backends_lists_what_runs_here():
    available = vitkernels.available_backends()
    assert available[-2:] == ["torch", "reference"]
    assert all(_native.missing[name] is None for name in available)


def test_every_raw_operator_has_every_overload():
    packets = [n for n in dir(torch.ops.vitkernels) if n.endswith(("_fwd", "_bwd"))]
    assert len(packets) >= 8
    for packet in packets:
        overloads = getattr(torch.ops.vitkernels, packet).overloads()
        assert sorted(overloads) == sorted(["default", *_dispatch.KERNEL_BACKENDS])


def test_default_overload_is_what_auto_records():
    seen = []
    x = torch.randn(2, 3, 8)
    exported = torch.export.export(_Norm(), (x,))
    for node in exported.graph.nodes:
        if node.op == "call_function" and "vitkernels" in str(node.target):
            seen.append(str(node.target))
    assert seen == ["vitkernels.add_layer_norm_fwd.default"]
    torch.testing.assert_close(
        exported.module()(x), torch.nn.functional.layer_norm(x, (8,), eps=1e-6)
    )


class _Norm(torch.nn.Module):
    def forward(self, x):
        return ops.add_layer_norm(x, None, None, None)[0]


def test_unreadable_records_are_reported_and_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "vitkernels").mkdir()
    (tmp_path / "vitkernels" / "records.json").write_text("{not json")
    with pytest.warns(UserWarning, match=r"records\.json is unreadable, ignored"):
        assert isinstance(_dispatch._load_records(), dict)
    won = '{"sm_90": {"operators": {"attention": {"forward fp32": {"backend": "cuda"}}}}}'
    (tmp_path / "vitkernels" / "records.json").write_text(won)
    assert _dispatch._load_records()["sm_90"]["attention"]["forward fp32"] == "cuda"
