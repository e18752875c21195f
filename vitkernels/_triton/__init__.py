"""What the Triton slices share. It imports triton, so only `_triton*.py` files import it."""

from vitkernels._triton.dropout import dropout_scalars, keep_mask
from vitkernels._triton.launch import (
    FLOATS,
    INTERPRETED,
    capability,
    cdiv,
    check_dropout,
    check_like,
    collapse_rows,
    fail,
    multiprocessors,
    on_device,
    power_of_two,
    stages,
)

__all__ = [
    "FLOATS",
    "INTERPRETED",
    "capability",
    "cdiv",
    "check_dropout",
    "check_like",
    "collapse_rows",
    "dropout_scalars",
    "fail",
    "keep_mask",
    "multiprocessors",
    "on_device",
    "power_of_two",
    "stages",
]
