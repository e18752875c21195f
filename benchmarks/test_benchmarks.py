"""The same cases for pytest-benchmark: `pytest benchmarks/`. Groups hold the peers of one case."""

import pytest
import torch

from . import (
    bench_add_layer_norm,
    bench_attention,
    bench_distillation_loss,
    bench_linear_gelu,
    bench_patch_embed,
    bench_patch_merge,
    bench_window_attention,
)
from .harness import check, problem_of

MODULES = (
    bench_add_layer_norm,
    bench_attention,
    bench_distillation_loss,
    bench_patch_embed,
    bench_patch_merge,
    bench_linear_gelu,
    bench_window_attention,
)
CASES = [case for module in MODULES for case in module.cases()]
PEERS = [
    pytest.param(case, peer, id=f"{case.title}-{peer}")
    for case in CASES
    for peer in (*case.functions, *(f"compile {name}" for name in case.compiled()))
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch._dynamo.reset()


@pytest.mark.parametrize(("case", "peer"), PEERS)
def test_speed(benchmark, case, peer):
    benchmark.group = case.title
    runners = case.runners()
    check(case, {name: runners[name] for name in {"vitkernels", "eager", peer}})
    flops, moved = case.cost
    inputs, grads = problem_of(case)
    benchmark(runners[peer], inputs, grads)
    best = benchmark.stats.stats.min
    benchmark.extra_info |= {"GB/s": moved / best / 1e9, "GFLOP/s": flops / best / 1e9}
