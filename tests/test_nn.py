"""The modules of vitkernels.nn by themselves: when they take several steps in one operator."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import vitkernels.nn.linear
import vitkernels.nn.mlp
from vitkernels.nn import GELUTanh, Linear, Mlp, QuickGELU

GELUS = {
    "erf": (nn.GELU, "none"),
    "tanh": (lambda: nn.GELU("tanh"), "tanh"),
    "GELUTanh": (GELUTanh, "tanh"),
    "QuickGELU": (QuickGELU, "quick"),
}


def spy(monkeypatch, module, name: str) -> list[dict]:
    """The keyword arguments of each call of the operator that this module imports."""
    seen, operator = [], getattr(module, name)

    def watched(*args, **kwargs):
        seen.append(kwargs)
        return operator(*args, **kwargs)

    monkeypatch.setattr(module, name, watched)
    return seen


@pytest.mark.parametrize("kind", GELUS)
def test_fc1_takes_the_gelu(kind, monkeypatch):
    make, approximate = GELUS[kind]
    mlp, x = Mlp(16, 40, act_layer=make), torch.randn(2, 5, 16)
    calls = spy(monkeypatch, vitkernels.nn.mlp, "linear_gelu")
    got = mlp(x)
    assert calls == [{"approximate": approximate}]
    expected = mlp.fc2(mlp.act(F.linear(x, mlp.fc1.weight, mlp.fc1.bias)))
    assert torch.allclose(got, expected, atol=1e-6)


CHANGES = {
    "hook on fc1": lambda m: m.fc1.register_forward_hook(lambda *_: None),
    "hook on act": lambda m: m.act.register_forward_pre_hook(lambda *_: None),
    "another activation": lambda m: setattr(m, "act", nn.ReLU()),
    "another Linear": lambda m: setattr(m, "fc1", nn.Linear(16, 40)),
    "forward of the activation": lambda m: setattr(m.act, "forward", torch.tanh),
    "weight norm": lambda m: nn.utils.parametrizations.weight_norm(m.fc1),
    "two tensors": lambda m: setattr(m.fc1, "weight", _two(m.fc1.weight)),
}


def _two(weight: nn.Parameter) -> nn.Parameter:
    """A subclass with operators of its own, as DTensor and quantized tensors are."""
    return nn.Parameter(TwoTensor(weight.detach().clone(), weight.detach().clone()))


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_mlp_runs_module_by_module(change, monkeypatch):
    mlp, x = Mlp(16, 40), torch.randn(2, 5, 16)
    CHANGES[change](mlp)
    calls = spy(monkeypatch, vitkernels.nn.mlp, "linear_gelu")
    got = mlp(x)
    assert calls == []
    h = mlp.act.forward(F.linear(x, mlp.fc1.weight, mlp.fc1.bias))
    expected = F.linear(h, mlp.fc2.weight, mlp.fc2.bias)
    got, expected = (getattr(t, "a", t) for t in (got, expected))
    assert torch.allclose(got, expected, atol=1e-6)


def test_a_weight_with_its_own_product_keeps_it(monkeypatch):
    calls = spy(monkeypatch, vitkernels.nn.linear, "linear")
    layer, x = Linear(16, 8), torch.randn(3, 16)
    expected = layer(x)
    assert len(calls) == 1
    layer.weight = _two(layer.weight)
    got = layer(x)
    assert isinstance(got, TwoTensor) and len(calls) == 1
    assert torch.allclose(got.a, expected, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_torch_s(bias):
    torch.manual_seed(0)
    ours = Linear(16, 8, bias=bias)
    torch.manual_seed(0)
    theirs = nn.Linear(16, 8, bias=bias)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x, results = torch.randn(2, 3, 16), []
    for layer in (ours, theirs):
        inp = x.clone().requires_grad_()
        out = layer(inp)
        out.sin().sum().backward()
        results.append([out, inp.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
