"""Bias tables at another window: timm's, whatever the default dtype."""

import pytest
import torch
from timm_stub import timm
from vit_pairs import needs_timm

from vitkernels.nn.resample import resample_bias_table, resample_patch_embed

WINDOWS = [((7, 7), (8, 8)), ((7, 7), (12, 12)), ((12, 12), (7, 7)), ((8, 8), (4, 6)),
           ((7, 7), (14, 7)), ((6, 4), (5, 9)), ((1, 1), (3, 2)), ((3, 3), (1, 1)),
           ((5, 5), (5, 5)), ((7, 7), (24, 24))]  # fmt: skip


@pytest.mark.skipif(**needs_timm)
@pytest.mark.parametrize("old, new", WINDOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_tables_are_resampled_as_timm_does(old, new, dtype):
    sides = [2 * w - 1 for w in (*old, *new)]
    table = torch.randn(sides[0] * sides[1], 3).to(dtype)
    expected = timm.layers.resize_rel_pos_bias_table(
        table, new_window_size=new, new_bias_shape=(sides[2] * sides[3], 3), old_window_size=old
    )
    got = resample_bias_table(table, new, old)
    assert got.shape == expected.shape and got.dtype == dtype
    limit = 1e-6 if dtype == torch.float32 else 2**-8  # a tie may round either way
    assert (got - expected).abs().max() <= limit * expected.abs().max()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_changes_nothing(default):
    def resampled():
        return (
            resample_bias_table(table, (6, 5), (4, 4)),
            resample_bias_table(table[:1], (3, 2), (1, 1)),
            resample_patch_embed(weight, (6, 6)),
        )

    table, weight = torch.randn(49, 3), torch.randn(4, 3, 8, 8)
    expected = resampled()
    torch.set_default_dtype(default)
    try:
        assert all(map(torch.equal, resampled(), expected))
    finally:
        torch.set_default_dtype(torch.float32)
