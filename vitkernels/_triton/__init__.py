"""What the Triton slices share. It imports triton, so only `_triton*.py` files import it."""

from vitkernels._triton.dropout import dropout_scalars, keep_mask
from vitkernels._triton.launch import (
    FLOATS,
    INTERPRETED,
    capability,
    cdiv,
    check_dropout,
    check_like,
    check_wanted,
    collapse_rows,
    fail,
    multiprocessors,
    on_device,
    power_of_two,
    stages,
)
from vitkernels._triton.reduce import sum_partials
from vitkernels._triton.rows import load_columns, store_partial
from vitkernels._triton.tiles import (
    Tile,
    choose_tile,
    dot_dtype,
    reduction_splits,
    split_columns,
    tile_of,
)

__all__ = [
    "FLOATS",
    "INTERPRETED",
    "Tile",
    "capability",
    "cdiv",
    "check_dropout",
    "check_like",
    "check_wanted",
    "choose_tile",
    "collapse_rows",
    "dot_dtype",
    "dropout_scalars",
    "fail",
    "keep_mask",
    "load_columns",
    "multiprocessors",
    "on_device",
    "power_of_two",
    "reduction_splits",
    "split_columns",
    "stages",
    "store_partial",
    "sum_partials",
    "tile_of",
]
