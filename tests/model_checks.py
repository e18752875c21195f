"""What every family of models is asked: timm's numbers, and what people do with a model.

theirs, ours: two models of the same weights, as the family's `pair` makes them.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from vit_pairs import ROUNDING, logits_and_grads, relative_errors, same

from vitkernels import use_backend

# --- timm's numbers -------------------------------------------------------------------------------


def float64_truth(theirs: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return logits_and_grads(copy.deepcopy(theirs).double(), x.double())


def check_float64(theirs: nn.Module, ours: nn.Module, x: torch.Tensor) -> None:
    """The reference in float64 computes what timm does."""
    with use_backend("reference"):
        got = float64_truth(ours, x)
    same(got, float64_truth(theirs, x), 1e-9)


def check_fp32(
    theirs: nn.Module,
    ours: nn.Module,
    x: torch.Tensor,
    backend: str,
    least: Callable[[str, torch.Tensor], float] = lambda key, truth: 1e-6,
) -> None:
    """In fp32 each output and gradient errs at most twice as timm's, or `least(key, truth)`."""
    truth = float64_truth(theirs, x)
    base = relative_errors(logits_and_grads(theirs, x), truth)
    with use_backend(backend):
        errors = relative_errors(logits_and_grads(ours, x), truth)
    for key, error in errors.items():
        limit = max(2 * base[key], least(key, truth[key]))
        assert error <= limit, f"{backend} {key}: ours {error:.3g}, timm's {base[key]:.3g}"


BF16 = ("bfloat16", "autocast", "mixed")


def check_bf16(
    theirs: nn.Module, ours: nn.Module, x: torch.Tensor, how: str, fewest: int = 1
) -> None:
    """bfloat16: everything; autocast: fp32 parameters; mixed: bf16 Linears beside fp32 norms.

    Gradients of fewer than `fewest` numbers do not count.
    """
    truth = float64_truth(theirs, x)
    if how == "bfloat16":
        theirs, ours, x = theirs.bfloat16(), ours.bfloat16(), x.bfloat16()
    if how == "mixed":
        for module in ours.modules():
            if isinstance(module, nn.Linear):
                module.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how != "bfloat16"):
        got = logits_and_grads(ours, x)
        base = logits_and_grads(theirs, x)
    assert got["logits"].dtype == base["logits"].dtype
    errors, base = relative_errors(got, truth), relative_errors(base, truth)
    counted = [key for key in errors if base[key] > 1e-4 and truth[key].numel() >= fewest]
    ratios = torch.tensor([errors[key] / base[key] for key in counted])
    assert ratios.median() <= 1.1  # one gradient's 16-bit noise scatters, all of them do not
    assert ratios.max() <= 4, max(counted, key=lambda key: errors[key] / base[key])


def check_autocast_dtypes(theirs: nn.Module, ours: nn.Module, x: torch.Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        for method in ("forward_features", "forward"):
            expected, got = getattr(theirs, method)(x), getattr(ours, method)(x)
            assert got.dtype == expected.dtype
        _, expected = theirs.forward_intermediates(x, norm=True)
        _, got = ours.forward_intermediates(x, norm=True)
        assert [t.dtype for t in got] == [t.dtype for t in expected]


def check_draws(theirs: nn.Module, ours: nn.Module, x: torch.Tensor) -> None:
    """From one seed dropout and DropPath drop the same; from another, something else."""
    results = []
    for model in (theirs, ours):
        torch.manual_seed(11)
        results.append(logits_and_grads(model, x))
    base, got = results
    same(got, base, 5e-5)
    torch.manual_seed(12)
    assert not torch.equal(ours(x), got["logits"]), "another seed drops something else"


def check_loss_curve(
    theirs: nn.Module, ours: nn.Module, x: torch.Tensor, steps: int, lr: float = 1e-3
) -> None:
    target = torch.randint(0, 10, (len(x),))
    curves = []
    for model in (theirs.train(), ours.train()):
        torch.manual_seed(3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        losses = []
        for _ in range(steps):
            loss = nn.functional.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-1] < 0.5 * curves[0][0]
    assert (curves[0] - curves[1]).abs().max() < 1e-3


def check_source_left_alone(theirs: nn.Module, ours: nn.Module, dtype: torch.dtype) -> None:
    """`ours`, made of `theirs`: a copy of every parameter, in its dtype and as trainable."""
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    for (name, mine), (_, other) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert torch.equal(mine, other) and mine.data_ptr() != other.data_ptr(), name
        assert mine.dtype == dtype and mine.requires_grad == other.requires_grad
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], t) for name, t in theirs.state_dict().items())


# --- what people do with a model ------------------------------------------------------------------


def check_checkpointing(ours: nn.Module, x: torch.Tensor) -> None:
    results = []
    for enabled in (False, True):
        ours.train().set_grad_checkpointing(enabled)
        torch.manual_seed(6)
        results.append(logits_and_grads(ours, x))
    same(results[1], results[0])


def check_one_graph(ours: nn.Module, x: torch.Tensor, mode: str, limit: float = ROUNDING) -> None:
    """mode: eval, train, checkpointing or autocast."""
    ours.train(mode in ("train", "checkpointing"))
    ours.set_grad_checkpointing(mode == "checkpointing")
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    results = []
    for model in (ours, compiled):
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            got = logits_and_grads(model, x)
        results.append({key.removeprefix("_orig_mod."): value for key, value in got.items()})
    same(results[1], results[0], 2e-2 if mode == "autocast" else limit)


def check_dynamic_batch(ours: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """One graph for batches of any size."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    with torch.no_grad():
        for x in batches:
            torch._dynamo.mark_dynamic(x, 0)
            same({"y": compiled(x)}, {"y": ours(x)})
    assert counter.frame_count == 1


def check_export(ours: nn.Module, x: torch.Tensor) -> None:
    program = torch.export.export(ours, (x,))
    same({"y": program.module()(x)}, {"y": ours(x)})


COPIES = ("deepcopy", "pickle", "torch.save", "state_dict")


def check_copy(
    ours: nn.Module, x: torch.Tensor, how: str, another: Callable[[], nn.Module]
) -> None:
    """A copy computes the same, and is one. another: makes a model of the same sizes."""
    buffer = io.BytesIO()
    if how == "deepcopy":
        other = copy.deepcopy(ours)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(ours))
    elif how == "torch.save":
        torch.save(ours, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    else:
        other = another()
        assert not torch.equal(other(x), ours(x))
        torch.save(ours.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer), strict=True)
    assert torch.equal(other(x), ours(x))
    with torch.no_grad():
        next(iter(other.parameters())).add_(1)
    assert not torch.equal(other(x), ours(x))


def check_functional_gradients(ours: nn.Module, x: torch.Tensor) -> None:
    parameters = dict(ours.named_parameters())

    def loss(values):
        return torch.func.functional_call(ours, values, (x,)).square().sum()

    functional = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    same(functional, {name: p.grad for name, p in parameters.items()})


def check_frozen(ours: nn.Module, x: torch.Tensor, trained: tuple[str, ...]) -> None:
    """Only parameters with one of `trained` in their name want, and get, a gradient."""
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_(any(part in name for part in trained))
    ours(x).sum().backward()
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is not None) == any(part in name for part in trained), name


def check_intermediates(
    theirs: nn.Module, ours: nn.Module, x: torch.Tensor, options: dict, limit: float = 2e-6
) -> None:
    """forward_intermediates: the same structure, shapes and numbers."""
    expected = torch.utils._pytree.tree_flatten(theirs.forward_intermediates(x, **options))
    got = torch.utils._pytree.tree_flatten(ours.forward_intermediates(x, **options))
    assert got[1] == expected[1]
    for a, b in zip(got[0], expected[0], strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= limit * b.norm()
