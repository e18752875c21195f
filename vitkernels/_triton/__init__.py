"""What the Triton slices share. It imports triton, so only `_triton*.py` files import it."""

from vitkernels._triton.dropout import dropout_scalars, keep_mask
from vitkernels._triton.launch import (
    INTERPRETED,
    capability,
    cdiv,
    collapse_rows,
    multiprocessors,
    on_device,
    power_of_two,
    stages,
)

__all__ = [
    "INTERPRETED",
    "capability",
    "cdiv",
    "collapse_rows",
    "dropout_scalars",
    "keep_mask",
    "multiprocessors",
    "on_device",
    "power_of_two",
    "stages",
]
