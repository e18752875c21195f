"""Clusters of blocks, emulated: boxes loaded into every block at once, barriers of other blocks, a
planted bug of each kind.

The kernels are in tests/emulator/cluster_sm90.cuh.
"""

from __future__ import annotations

import re

import pytest
import torch
from emulated import SEEDS, compile_kernels, nan
from native_build import CXX, ROOT

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler: there is nothing to emulate")

STEPS = 5
BUGS = {  # enum ClusterBug of cluster_sm90.cuh
    "none": 0,
    "begin": 1,
    "end": 2,
    "own stage": 3,
    "init fence": 4,
}


@pytest.fixture(scope="module")
def library():
    return compile_kernels(ROOT / "tests/emulator/cluster.cpp", "emulator_cluster")


@pytest.fixture
def kernels(library):
    library.set_seed(1)
    return library


def boxes(clusters):
    return torch.randn(clusters, STEPS, 64, 64).to(torch.bfloat16)


def share(kernels, bug, data, size):
    clusters = len(data)
    out, ranks = nan(clusters, size, STEPS, 64, 64), torch.full((clusters, size), -1).int()
    kernels.share(BUGS[bug], data, out, ranks, size, STEPS, clusters * size)
    return out, ranks


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_blocks_of_a_cluster_share_boxes(kernels, size):
    data = boxes(clusters=3)
    for seed in SEEDS:
        kernels.set_seed(seed)
        out, ranks = share(kernels, "none", data, size)
        assert torch.equal(out, data.float()[:, None].expand_as(out))
        assert torch.equal(ranks, torch.arange(size).int().expand(3, -1))


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        ("begin", "of an mbarrier that is not initialized"),
        ("end", "of block . of the cluster, which has ended"),
        ("own stage", "more than the 2 arrivals|was written while a TMA load"),
        ("init fence", "mbarrier_fence_init has not shown"),
    ],
)
def test_a_missing_step_is_caught(kernels, bug, message):
    """With every seed but for "begin" and "end": whether a block is so early is the scheduler's."""
    data, caught = boxes(clusters=2), 0
    for seed in SEEDS:
        kernels.set_seed(seed)
        try:
            out, _ = share(kernels, bug, data, 2)
            caught += not torch.equal(out, data.float()[:, None].expand_as(out))
        except RuntimeError as error:
            assert re.search(message, str(error))
            caught += 1
    assert caught >= (1 if bug in ("begin", "end") else len(SEEDS)), caught


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (0, "tma_load_multicast of block 2 of a cluster of 2"),
        (1, "mbarrier_arrive_at of block 2 of a cluster of 2"),
        (2, "mbarrier_arrive_at of block 1 of the cluster, which has ended"),
        (3, "off its 128-byte line"),
        (4, r"deadlock.*block \(\d,0,0\)(.|\n)*mbarrier_wait(.|\n)*block"),
    ],
)
def test_misuse_is_refused(kernels, kind, message):
    data = torch.zeros(64, 64, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=message):
        kernels.misuse(kind, data, 2, 2)


@pytest.mark.parametrize(("blocks", "size"), [(3, 2), (16, 16), (2, 0)])
def test_impossible_clusters_are_refused(kernels, blocks, size):
    data = torch.zeros(64, 64, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=f"cannot launch with clusters of {size} blocks"):
        kernels.misuse(0, data, blocks, size)
