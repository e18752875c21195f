"""Checkpoint files: a path in, tensors by name out. What a file holds is never run as code."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "net")
PREFIXES = ("module.", "_orig_mod.", "model.")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def read_file(loader: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth, .pt, .bin or .npz file, wrappers and prefixes off.

    Of a training checkpoint with averaged weights (EMA), those, as timm takes them.
    """
    if not path.exists():
        raise FileNotFoundError(f"{loader}: there is no file or folder {str(path)!r}")
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise ValueError(
            f"{loader}: {path.name} must end in {', '.join(_READERS)}, got {path.suffix!r}"
        )
    tensors = unwrap(read(loader, path))
    if not tensors:
        raise ValueError(f"{loader}: {path.name} holds no tensors by name")
    return tensors


def read_folder(loader: str, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json (preprocessor_config.json under "preprocessor") and the tensors beside it."""
    config = _json(loader, folder / "config.json")
    if config is None:
        raise ValueError(f"{loader}: the folder {str(folder)!r} has no config.json")
    config["preprocessor"] = _json(loader, folder / "preprocessor_config.json") or {}
    for name in WEIGHTS:
        if (folder / name).exists():
            return config, read_file(loader, folder / name)
        index = _json(loader, folder / f"{name}.index.json")
        if index is not None:
            tensors: dict[str, Tensor] = {}
            for shard in sorted(set(index.get("weight_map", {}).values())):
                tensors |= read_file(loader, folder / Path(shard).name)
            return config, tensors
    raise ValueError(
        f"{loader}: the folder {str(folder)!r} has no {' or '.join(WEIGHTS)}, whole or in shards"
    )


def _json(loader: str, path: Path) -> dict | None:
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{loader}: {path.name} is not readable JSON: {error}") from error


def unwrap(tree: dict) -> dict[str, Tensor]:
    for _ in range(3):
        inner = next((tree[key] for key in WRAPPERS if isinstance(tree.get(key), dict)), None)
        if inner is None:
            break
        tree = inner
    tensors = {key: value for key, value in tree.items() if isinstance(value, Tensor)}
    while prefix := next((p for p in PREFIXES if _all_start(tensors, p)), None):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _all_start(tensors: dict, prefix: str) -> bool:
    return bool(tensors) and all(isinstance(k, str) and k.startswith(prefix) for k in tensors)


def _safetensors(loader: str, path: Path) -> dict:
    try:
        import safetensors
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            f"{loader}: {path.name} needs safetensors (pip install safetensors): {error}"
        ) from error
    try:
        return load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        _unreadable(loader, path, "a safetensors file", error)


def _torch(loader: str, path: Path) -> dict:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the args of FB checkpoints
            tree = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" not in str(error):  # that is no pickle at all
            raise ValueError(
                f"{loader}: {path.name} holds Python objects beside tensors, and loading them could"
                " run code; save the tensors alone: torch.save(model.state_dict(), ...)"
            ) from error
        _unreadable(loader, path, "a PyTorch checkpoint", error)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        _unreadable(loader, path, "a PyTorch checkpoint", error)
    if not isinstance(tree, dict):
        raise ValueError(
            f"{loader}: {path.name} must hold a dict of tensors, got {type(tree).__name__}"
        )
    return tree


def _npz(loader: str, path: Path) -> dict:
    import zipfile
    import zlib

    try:
        import numpy as np
    except ImportError as error:
        raise ImportError(f"{loader}: {path.name} needs numpy (pip install numpy)") from error
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: _from_numpy(arrays[name]) for name in arrays.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, TypeError) as error:
        _unreadable(loader, path, "a NumPy .npz file of plain arrays", error)


def _from_numpy(array) -> Tensor:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # JAX's bfloat16 has no NumPy name
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16).float()
    return torch.from_numpy(array)


def _unreadable(loader: str, path: Path, what: str, error: Exception):
    reason = str(error).strip().splitlines()
    raise ValueError(
        f"{loader}: {path.name} is not readable as {what} (cut short, or something else):"
        f" {reason[0] if reason else type(error).__name__}"
    ) from error


_READERS = {
    ".safetensors": _safetensors,
    ".pth": _torch,
    ".pt": _torch,
    ".bin": _torch,
    ".npz": _npz,
}
