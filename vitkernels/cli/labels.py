"""The names of the classes: a text file with one on each line, or JSON."""

from __future__ import annotations

import json
from pathlib import Path

from .usage import UsageError, check_input_file

FORMS = 'one name on each line, or JSON: ["cat", ...] or {"0": "cat", ...}'


def read_labels(path: Path, num_classes: int) -> list[str]:
    """num_classes names, in the order of the model's outputs."""
    check_input_file(path, "--labels")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"--labels: {path} is not a text file: it holds {FORMS}") from error
    names = _from_json(text, path) if text.lstrip().startswith(("[", "{")) else _lines(text)
    if len(names) != num_classes:
        raise UsageError(
            f"--labels: {path} names {len(names)} classes, the weights have {num_classes}: "
            f"it holds {FORMS}"
        )
    return names


def labels_beside(weights: Path, num_classes: int) -> list[str] | None:
    """The names in config.json beside the weights, where they are as many as the classes."""
    path = (weights if weights.is_dir() else weights.parent) / "config.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        names = in_order(facts["id2label"]) if "id2label" in facts else facts["label_names"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    fits = isinstance(names, list) and len(names) == num_classes
    return [_name(value) for value in names] if fits else None


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.rstrip().splitlines()]


def _from_json(text: str, path: Path) -> list[str]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--labels: {path} is not valid JSON: {error}") from error
    if isinstance(found, dict):
        found = in_order(found.get("id2label", found))
    if not isinstance(found, list):
        raise UsageError(f"--labels: {path} must number its names from 0 on: it holds {FORMS}")
    return [_name(value) for value in found]


def in_order(found) -> list | None:
    """The values under the keys 0, 1, 2, ...; None when these are not the keys."""
    try:
        numbered = {int(key): value for key, value in found.items()}
        return [numbered[i] for i in range(len(found))]
    except (AttributeError, ValueError, KeyError):
        return None


def _name(value) -> str:
    """ImageNet's own index holds pairs of a WordNet id and a name."""
    return str(value[-1] if isinstance(value, list) and value else value)
