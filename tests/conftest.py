"""The ordinary session: CPU tensors, Triton by its interpreter, CUDA kernels by the emulator.

pytest -n 2                  everything but the tests marked slow or gpu
pytest -m slow               the long fuzz and the rest of `make test-all`
pytest -m gpu                on a machine with an NVIDIA GPU: no interpreter, no emulator
pytest --seed random         another seed for inputs and fuzz; the seed is printed
"""

import os
import random

import pytest


def pytest_addoption(parser):
    parser.addoption("--seed", default="1", help="seed of inputs and fuzz: a number, or `random`")


def pytest_configure(config):
    if config.option.seed == "random":
        config.option.seed = str(random.SystemRandom().randrange(2**31))
    if not _wants_gpu(config):
        # Both are read when Triton and vitkernels are first imported, so they come before.
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["VITKERNELS_EMULATE"] = "1"
        # The order in which emulated threads run; its errors name the seed.
        os.environ.setdefault("VITKERNELS_EMULATOR_SEED", config.option.seed)
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


def _wants_gpu(config) -> bool:
    expression = config.option.markexpr
    return "gpu" in expression and "not gpu" not in expression


def pytest_report_header(config):
    return f"vitkernels: --seed {config.option.seed}"


# Each xdist worker hands its cases to the controller, which prints their union as one line.


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        from vitkernels.testing import cases

        session.config.workeroutput["distinct_cases"] = [list(case) for case in cases.seen]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    from vitkernels.testing import cases

    cases.merge(getattr(node, "workeroutput", {}).get("distinct_cases", ()))


def pytest_terminal_summary(terminalreporter, config):
    from vitkernels.testing import cases

    if cases.seen:
        terminalreporter.write_line(f"{cases.summary()} (--seed {config.option.seed})")


@pytest.fixture(scope="session")
def seed(request) -> int:
    """The seed of this run (`--seed`)."""
    return int(request.config.option.seed)


@pytest.fixture(autouse=True)
def _same_inputs_every_time(request):
    """Torch's generator starts from `--seed` in every test, whatever ran before."""
    import torch

    torch.manual_seed(int(request.config.option.seed))


@pytest.fixture
def poisoned_memory():
    """`torch.empty`, and the stable ABI's `new_empty`, give NaN: what nobody wrote shows."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(4).isnan().all(), "torch.empty was not poisoned"
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def hardware_environment() -> dict[str, str]:
    """The environment of a subprocess that compiles for real: no interpreter, no emulator."""
    dropped = ("TRITON_INTERPRET", "VITKERNELS_EMULATE")
    return {name: value for name, value in os.environ.items() if name not in dropped}
