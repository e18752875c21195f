"""What two or more Triton slices share. Importing it imports triton, so only `_triton.py` files do."""

from vitkernels._triton.dropout import dropout_scalars, keep_mask
from vitkernels._triton.launch import INTERPRETED, collapse_rows, multiprocessors, on_device

__all__ = [
    "INTERPRETED",
    "collapse_rows",
    "dropout_scalars",
    "keep_mask",
    "multiprocessors",
    "on_device",
]
