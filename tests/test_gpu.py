"""The numerics of `make test-gpu` one by one, on an NVIDIA GPU: `pytest -m gpu -k sm90`.

Nothing here runs in `make test`; tests/test_gpu_parts.py runs the small cases on a CPU.
"""

import pytest
import torch
from gpu_cases import NUMERICS

from vitkernels.evidence.outcome import NOT_RUN, PASSED, REFUSED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is visible"),
]


@pytest.mark.parametrize("name", NUMERICS)
def test_numerics(name):
    outcome = NUMERICS[name].outcome("cuda")
    if outcome.status == REFUSED:
        pytest.skip(outcome.why)
    # What is missing on a GPU machine is a failure, not a skip; out of memory is none.
    if outcome.status == NOT_RUN and outcome.why == "out of memory":
        pytest.skip(outcome.why)
    assert outcome.status == PASSED, outcome.why
