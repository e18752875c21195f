"""`vitkernels info`: versions, devices, native code, and the backend each operator takes here."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch

from .. import _dispatch, _native, ops
from .._version import __version__

# Facts of an ordinary call, for the limits of the BACKENDS tables.
_SAMPLE_FACTS = {
    "attention": {"D": 64},
    "attention_qkvpacked": {"D": 64},
    "window_attention": {"D": 32, "N": 49},
}
_SAMPLE_SIZES = {  # of its regime
    "attention": (197, 64),
    "attention_qkvpacked": (197, 64),
    "window_attention": (49, 32),
}


def configure(commands) -> None:
    parser = commands.add_parser("info", help="what runs on this machine, and what would add more")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    print_info()
    return 0


def print_info() -> None:
    for title, rows in sections().items():
        print(title)
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            print(f"  {name:<{width}}  {text}")


def sections() -> dict[str, list[tuple[str, str]]]:
    """Everything that is printed, as title -> (name, text)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {
        "Versions": versions(),
        "Machine": machine(),
        "Backends": [(name, _native.missing[name] or "ready") for name in _dispatch.BACKEND_NAMES],
        "Native code": native_code(),
    }
    for kind in dict.fromkeys((device.type, "cpu")):
        found[f"What `auto` takes for {kind.upper()} tensors"] = choices(torch.device(kind))
    return found


def versions() -> list[tuple[str, str]]:
    rows = [("vitkernels", __version__), ("python", platform.python_version())]
    for package in ("torch", "triton", "timm", "pillow", "matplotlib", "rich", "safetensors"):
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    return rows


def machine() -> list[tuple[str, str]]:
    rows = [
        ("cpu", f"{cpu_name()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()}"),
        ("cpu features", ", ".join(cpu_features()) or "none of those that the kernels know"),
    ]
    if not torch.cuda.is_available():
        return [*rows, ("gpu", "none visible to torch")]
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        memory = f"{facts.total_memory / 2**30:.0f} GiB"
        rows.append((f"gpu {i}", f"{facts.name}, sm_{facts.major}{facts.minor}, {memory}"))
    return rows


def cpu_name() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    wanted = ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "sve")
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            flags = set(line.partition(":")[2].split())
            return [name for name in wanted if name in flags]
    return []


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def native_code() -> list[tuple[str, str]]:
    rows = []
    facts = _native.build_facts()
    if facts is None:
        why = (
            "vitkernels._C is not built (it needs pybind11 and Python.h; nothing at run time does)"
        )
        rows.append(("build facts", why))
    else:
        rows += [(name.replace("_", " "), text) for name, text in facts.build_facts().items()]
        rows.append(("isa level used", facts.cpu_isa()))
    if _native.missing["cuda"] is None and torch.cuda.is_available():
        rows.append(("nvidia driver", "code built by nvcc 13 needs driver 580 or newer"))
    if sys.platform != "linux":
        rows.append(
            ("platform", f"{sys.platform} is untested; Linux is what the kernels are built for")
        )
    return rows


def choices(device: torch.device) -> list[tuple[str, str]]:
    """For each operator, the backend of an fp32 call and why each other one is not taken."""
    rows = []
    for op in ops.__all__:
        table = backends_of(op)
        if table is None:
            rows.append((op, "plain PyTorch, for pictures; no backends"))
            continue
        taken = taken_backend(op, device)
        others: dict[str, list[str]] = {}
        for row in table:
            if row.name != taken:
                others.setdefault(why_not(op, row, device), []).append(row.name)
        reasons = "; ".join(f"{', '.join(names)}: {why}" for why, names in others.items())
        in_bf16 = taken_backend(op, device, torch.bfloat16)
        also = "" if in_bf16 == taken else f", {in_bf16} in bf16"
        rows.append((op, f"{taken}{also}  ({reasons})"))
    return rows


def taken_backend(op: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The backend that `auto` runs for an ordinary call of this operator."""
    table, facts = backends_of(op), _SAMPLE_FACTS.get(op, {})
    options = {"sizes": _SAMPLE_SIZES.get(op, (768,)), **facts}
    chosen = _dispatch.choose(op, table, None, device, (dtype,), **options)
    return "cpu" if chosen == "auto" else chosen


def why_not(op: str, row, device: torch.device) -> str:
    """Why `auto` does not take a row of the table for an ordinary call."""
    if _native.missing[row.name] is not None:
        return "not ready, see Backends"
    reason = row.refusal(device, (torch.float32,), _SAMPLE_FACTS.get(op, {}))
    if reason is None and device.type == "cuda" and row.name in ("cuda", "triton"):
        return "no hardware record in which it wins on this GPU"
    return reason or "only by name"


def backends_of(op: str):
    """The BACKENDS table of an operator's slice, or None for one without backends."""
    module = sys.modules[getattr(ops, op).__module__]
    function_takes_backend = "backend" in getattr(ops, op).__kwdefaults__
    return module.BACKENDS if function_takes_backend else None
