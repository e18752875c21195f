"""Standardised convolutions: timm's numbers, and a kept weight that is never out of date."""

import copy
import io
import pickle

import pytest
import torch
from hybrid_pairs import images, pair
from torch import nn
from vit_pairs import logits_and_grads, needs_timm, same

from vitkernels.nn import StdConv2d, std_conv
from vitkernels.nn.same_padding import MaxPool2dSame
from vitkernels.testing import cases


def layer(**more) -> StdConv2d:
    return StdConv2d(8, 16, 3, **more).eval()


def out_of(conv: StdConv2d) -> torch.Tensor:
    with torch.no_grad():
        return conv(torch.linspace(-1, 1, 8 * 25).reshape(1, 8, 5, 5).to(conv.weight.dtype))


def fresh(conv: StdConv2d) -> torch.Tensor:
    """What the weight says now: of a layer that has kept nothing."""
    other = StdConv2d(8, 16, 3, eps=conv.eps, dtype=conv.weight.dtype).eval()
    with torch.no_grad():
        other.weight.copy_(conv.weight)
    return out_of(other)


@pytest.fixture
def standardized(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the weights that are standardised, one for each time."""
    seen, original = [], std_conv.standardize

    def watched(weight, eps):
        seen.append(tuple(weight.shape))
        return original(weight, eps)

    monkeypatch.setattr(std_conv, "standardize", watched)
    return seen


# --- numbers --------------------------------------------------------------------------------------

SHAPES = [
    (7, 2, (14, 14)), (7, 2, (13, 9)), (3, 1, (8, 5)), (3, 2, (8, 8)), (3, 2, (7, 9)),
    (1, 1, (4, 4)), (1, 2, (5, 6)), (1, 2, (4, 4)),
]  # fmt: skip


@pytest.mark.skipif(**needs_timm)
@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("kernel, stride, size", SHAPES)
def test_equals_timm(kernel, stride, size, padding):
    from timm.layers import StdConv2d as Symmetric
    from timm.layers import StdConv2dSame

    cls = StdConv2dSame if padding == "same" else Symmetric
    theirs = cls(6, 10, kernel, stride, eps=1e-8).double()
    ours = StdConv2d(6, 10, kernel, stride, padding, eps=1e-8).double()
    ours.load_state_dict(theirs.state_dict())
    x, results = torch.randn(2, 6, *size).double(), []
    for conv in (theirs, ours):
        inp = x.clone().requires_grad_()
        y = conv(inp)
        y.sin().sum().backward()
        results.append({"y": y.detach(), "x": inp.grad, "weight": conv.weight.grad})
    same(results[1], results[0], 1e-12)
    assert results[1]["y"].shape[-2:] == tuple(-(-s // stride) for s in size)
    with torch.no_grad():  # the kept weight is that of a training step, bit for bit
        assert torch.equal(ours.eval()(x), ours.train()(x))
    cases.record("StdConv2d", "torch", torch.float64, f"{kernel}/{stride}", f"{size} {padding}")


@pytest.mark.skipif(**needs_timm)
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (3, 2), (1, 5)])
def test_max_pool_equals_timm(size):
    from timm.layers.pool2d_same import MaxPool2dSame as Timm

    x = torch.randn(2, 3, *size) - 5  # a padding of 0 would win
    assert torch.equal(MaxPool2dSame(3, 2)(x), Timm(3, stride=2)(x))


# --- what is kept ---------------------------------------------------------------------------------


def test_evaluation_standardises_once(standardized):
    conv = layer()
    first = out_of(conv)
    for _ in range(3):
        assert torch.equal(out_of(conv), first)
    with torch.inference_mode():
        conv(torch.randn(1, 8, 5, 5))
    assert len(standardized) == 1


def test_gradients_are_not_taken_of_what_is_kept(standardized):
    conv, x = layer(), torch.randn(1, 8, 5, 5)
    out_of(conv)
    conv(x).square().sum().backward()
    assert conv.weight.grad.abs().sum() > 0 and len(standardized) == 2
    with torch.no_grad():
        conv.train()(x)
        conv(x)
    assert len(standardized) == 4
    # a frozen weight is kept, also while gradients run through the layer
    conv.eval().requires_grad_(False)
    with torch.inference_mode():
        conv(x)
    inp = x.clone().requires_grad_()
    conv(inp).square().sum().backward()
    assert inp.grad.abs().sum() > 0 and len(standardized) == 5


def _optimizer(cls, forward=False, **settings):
    """A step in evaluation mode, without a forward that would forget what was kept."""

    def step(conv):
        optimizer = cls(conv.parameters(), lr=0.1, **settings)
        if forward:
            conv(torch.randn(1, 8, 5, 5)).square().sum().backward()
        else:
            conv.weight.grad = torch.randn_like(conv.weight)
        optimizer.step()

    return step


class ByData(torch.optim.Optimizer):
    """As some optimizers outside of torch write."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-group["lr"])


def _compiled_step(conv):
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    conv.weight.grad = torch.randn_like(conv.weight)
    torch._dynamo.reset()
    torch.compile(optimizer.step, backend="aot_eager")()


def _in_place(conv):
    with torch.no_grad():
        conv.weight[0].mul_(3).add_(1)


def _average(conv):
    """Of an EMA, as timm's ModelEmaV2 writes it."""
    with torch.no_grad():
        for value in conv.state_dict().values():
            value.lerp_(torch.randn_like(value), 0.5)


def _new_parameter_on_the_same_memory(conv):
    """Its version counts from 0 again, to the same number."""
    version = conv.weight._version
    assert version > 0
    conv.weight = nn.Parameter(conv.weight.data)
    with torch.no_grad():
        while conv.weight._version < version:
            conv.weight.copy_(torch.randn_like(conv.weight))
    assert conv.weight._version == version


def _exchanged_memory(conv):
    conv.weight.data = torch.randn_like(conv.weight)


def _exchanged_memory_at_the_old_address(conv):
    """The allocator gives out again what was freed, which here it must not have been."""
    shape = conv.weight.shape
    for _ in range(20):
        conv.weight.data = torch.empty(0)
        conv.weight.data = torch.randn(shape)


def _shared(conv):
    conv.weight.share_memory_()
    _in_place(conv)


def _swapped(conv):
    other = nn.Parameter(torch.randn_like(conv.weight))
    torch.utils.swap_tensors(conv.weight, other)


def _by_data_then_eval(conv):
    conv.train()
    conv.weight.data.add_(torch.randn_like(conv.weight))
    conv.eval()


def _vector(conv):
    nn.utils.vector_to_parameters(torch.randn(conv.weight.numel()), conv.parameters())


CHANGES = {
    "in place": _in_place,
    "SGD": _optimizer(torch.optim.SGD),
    "SGD foreach": _optimizer(torch.optim.SGD, foreach=True),
    "SGD fused": _optimizer(torch.optim.SGD, fused=True),
    "AdamW": _optimizer(torch.optim.AdamW),
    "AdamW foreach": _optimizer(torch.optim.AdamW, foreach=True),
    "AdamW fused": _optimizer(torch.optim.AdamW, fused=True),
    "by .data": _optimizer(ByData),
    "a compiled step": _compiled_step,
    "a step after a forward": _optimizer(torch.optim.SGD, forward=True),
    "load_state_dict": lambda c: c.load_state_dict({"weight": torch.randn_like(c.weight)}),
    "load_state_dict assign": lambda c: c.load_state_dict(
        {"weight": torch.randn_like(c.weight)}, assign=True
    ),
    "average": _average,
    "another parameter": lambda c: setattr(c, "weight", nn.Parameter(torch.randn(16, 8, 3, 3))),
    "the same memory": _new_parameter_on_the_same_memory,
    "exchanged memory": _exchanged_memory,
    "the old address": _exchanged_memory_at_the_old_address,
    "shared": _shared,
    "swapped": _swapped,
    "to": lambda c: c.to(torch.float64),
    "to and back": lambda c: c.half().float(),
    "to_empty": lambda c: c.to("meta").to_empty(device="cpu").load_state_dict(
        {"weight": torch.randn(16, 8, 3, 3)}
    ),
    "eps": lambda c: setattr(c, "eps", 0.5),
    "reset_parameters": lambda c: c.reset_parameters(),
    "by .data, then eval": _by_data_then_eval,
    "vector_to_parameters": _vector,
}  # fmt: skip


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_kept_is_never_out_of_date(change, inference):
    conv = layer()
    with torch.inference_mode(inference):
        before = out_of(conv)
    CHANGES[change](conv)
    with torch.inference_mode(inference):
        got = out_of(conv)
    assert torch.equal(got, fresh(conv))
    if got.dtype == before.dtype and change != "to and back":
        assert not torch.equal(got, before), "the change shows"
    assert torch.equal(out_of(conv), got)


def test_autocast_keeps_its_own(standardized):
    conv, x = layer(), torch.randn(1, 8, 5, 5)
    full = out_of(conv)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            got = conv(x)
            weight = conv.standardized_weight(x.device)
            assert got.dtype == weight.dtype == torch.bfloat16
        expected = nn.functional.conv2d(x, std_conv.standardize(conv.weight, conv.eps), padding=1)
    assert torch.equal(got, expected)
    assert len(standardized) == 3  # one of them is this test's own
    assert torch.equal(out_of(conv), full)


def test_copies_and_pickles_hold_no_second_weight():
    conv = layer()
    expected = out_of(conv)
    assert conv._kept is not None
    buffer = io.BytesIO()
    torch.save(conv, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(conv), pickle.loads(pickle.dumps(conv)),
        torch.load(buffer, weights_only=False),
    ):  # fmt: skip
        assert other._kept is None and torch.equal(out_of(other), expected)
    assert list(conv.state_dict()) == ["weight"] and len(list(conv.buffers())) == 0


@pytest.mark.parametrize("how", ["parametrized", "functional_call", "inference tensor", "vmap"])
def test_weights_that_are_no_parameter_are_not_kept(how):
    conv, x = layer(), torch.randn(1, 8, 5, 5)
    other = torch.randn_like(conv.weight)
    if how == "parametrized":
        nn.utils.parametrizations.weight_norm(conv)
        out_of(conv)
        with torch.no_grad():
            conv.parametrizations.weight.original0.mul_(-1)
        assert torch.equal(out_of(conv), fresh(conv))
    elif how == "functional_call":
        with torch.no_grad():
            got = torch.func.functional_call(conv, {"weight": other}, (x,))
            assert not torch.equal(got, conv(x))
    elif how == "inference tensor":
        with torch.inference_mode():
            conv = layer()
        out_of(conv)
        with torch.inference_mode():
            conv.weight.mul_(-1)
        assert torch.equal(out_of(conv), fresh(conv))
    else:
        weights = torch.stack([conv.weight.detach(), other])
        call = lambda w: torch.func.functional_call(conv, {"weight": w}, (x,))  # noqa: E731
        got = torch.func.vmap(call)(weights)
        assert torch.allclose(got[1], call(other), atol=1e-5)
    assert conv._kept is None or type(conv._kept.parameter) is nn.Parameter


def test_graphs_hold_the_standardisation():
    conv, x = layer(), torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        compiled = torch.compile(conv, backend="aot_eager", fullgraph=True)
        traced = torch.jit.trace(conv, x)
        exported = torch.export.export(conv, (x,)).module()
        for make in (compiled, traced, exported):
            assert torch.allclose(make(x), conv(x), atol=1e-6)
        _in_place(conv)  # all three read the same weight
        expected = conv.train()(x)
        for make in (compiled, traced, exported):
            assert torch.allclose(make(x), expected, atol=1e-6)


def test_a_fake_tensor_is_not_kept():
    from torch._subclasses.fake_tensor import FakeTensorMode

    conv = layer()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        conv(torch.empty(1, 8, 5, 5))
    assert conv._kept is None and torch.equal(out_of(conv), fresh(conv))


@pytest.mark.skipif(**needs_timm)
def test_a_model_standardises_once_and_follows_its_training(standardized):
    _, ours = pair("r8")
    convs = sum(isinstance(m, StdConv2d) for m in ours.modules())
    x = images("r8")
    with torch.inference_mode():
        first = ours(x)
        assert torch.equal(ours(x), first) and len(standardized) == convs > 10
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-2)
    logits_and_grads(ours, x)
    optimizer.step()
    with torch.inference_mode():
        got = ours(x)
    fresh_model = copy.deepcopy(ours)
    assert torch.equal(got, fresh_model(x)) and not torch.allclose(got, first)


def test_bad_arguments():
    with pytest.raises(ValueError, match="padding must be same or symmetric, got 'valid'"):
        StdConv2d(8, 8, 3, padding="valid")
