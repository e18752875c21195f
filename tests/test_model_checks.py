"""The checks of models fail where they should."""

import model_checks as checks
import pytest
import torch
from vit_pairs import images, needs_timm, pair

pytestmark = pytest.mark.skipif(**needs_timm)


def damaged(factor=1.001):
    """timm's model and ours, one weight of which is a little different."""
    theirs, ours = pair()
    with torch.no_grad():
        ours.blocks[1].mlp.fc1.weight.mul_(factor)
    return theirs, ours


@pytest.mark.parametrize(
    "check",
    [
        lambda: checks.check_float64(*damaged(1 + 1e-6), images()),
        lambda: checks.check_fp32(*damaged(), images(), "auto"),
        lambda: checks.check_bf16(*damaged(1.5), images(), "autocast"),
        lambda: checks.check_draws(*damaged(), images()),
        lambda: checks.check_loss_curve(*damaged(1.3), images(batch=8), 20),
        lambda: checks.check_source_left_alone(*damaged(), torch.float32),
        lambda: checks.check_intermediates(*damaged(), images(), {}),
    ],
    ids=["float64", "fp32", "bf16", "draws", "loss_curve", "source", "intermediates"],
)
def test_another_weight_is_seen(check):
    with pytest.raises(AssertionError):
        check()


class Restless(torch.nn.Module):
    """Its output depends on how often it was called, or on being traced."""

    def __init__(self, ours):
        super().__init__()
        self.ours, self.calls = ours, 0

    def set_grad_checkpointing(self, enable=True):
        self.ours.set_grad_checkpointing(enable)

    def __deepcopy__(self, memo):
        return Restless(pair()[1])

    def forward(self, x):
        if torch.compiler.is_compiling():
            return self.ours(x) * 1.001
        self.calls += 1
        return self.ours(x) * self.calls


@pytest.mark.parametrize(
    "check",
    [
        lambda m: checks.check_checkpointing(m, images()),
        lambda m: checks.check_one_graph(m, images(), "eval"),
        lambda m: checks.check_export(m, images()),
        lambda m: checks.check_copy(m, images(), "deepcopy", None),
    ],
    ids=["checkpointing", "one_graph", "export", "copy"],
)
def test_another_output_is_seen(check):
    with pytest.raises(AssertionError):
        check(Restless(pair()[1]))


def detached_head():
    _, ours = pair()
    head = ours.head
    head.forward = lambda x: torch.nn.functional.linear(x, head.weight.detach(), head.bias)
    return ours


def test_another_gradient_is_seen():
    _, ours = pair()
    ours.head.weight.register_hook(lambda grad: grad * 1.001)
    ours.zero_grad()
    with pytest.raises(AssertionError):
        checks.check_functional_gradients(ours, images())
    with pytest.raises(AssertionError):
        checks.check_frozen(detached_head(), images(), ("head",))


def test_a_recompilation_is_seen():
    _, ours = pair()
    with pytest.raises(AssertionError):
        checks.check_dynamic_batch(ours, [images(batch=2), torch.randn(2, 3, 32, 32).double()])
