"""EncoderBlock and Encoder give the numbers of torch's Transformer encoder on shared weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from encoder_pairs import (
    HEADS,
    MASKS,
    SETTINGS,
    B,
    C,
    N,
    masks,
    results,
    torch_encoder,
    torch_layer,
    within,
)
from torch import nn
from vit_pairs import relative_errors, same

import vitkernels.nn.layer_norm
from vitkernels import use_backend
from vitkernels.nn import Encoder, EncoderBlock
from vitkernels.ops._random import keep_mask
from vitkernels.testing import cases


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["post_norm", "pre_norm"])
def test_masks_in_float64(name, mask):
    theirs = torch_layer(name).double()
    ours = EncoderBlock.from_torch(theirs)
    x, options = torch.randn(B, N, C).double(), masks(mask, torch.float64)
    with use_backend("reference"):
        got = results(ours, x, **options)
    same(got, results(theirs, x, **options), 1e-9)
    cases.record("EncoderBlock", "reference", torch.float64, name, mask)


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_and_gradients(name):
    theirs = torch_layer(name)
    ours, x = EncoderBlock.from_torch(theirs), torch.randn(B, N, C)
    truth = results(copy.deepcopy(theirs).double(), x.double())
    with use_backend("reference"):
        same(results(copy.deepcopy(ours).double(), x.double()), truth, 1e-9)
    base = results(theirs, x)
    for backend in ("auto", "torch"):
        with use_backend(backend):
            within(results(ours, x), base, truth)
        cases.record("EncoderBlock", backend, torch.float32, name)
    if name != "tanh":  # torch's fast path takes erf for any GELU
        with torch.no_grad():
            assert (ours(x) - theirs(x)).norm() <= 2e-6 * theirs(x).norm()


@pytest.mark.parametrize("mask", ["none", "both", "causal"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("name", ["post_norm", "pre_norm"])
def test_encoder(name, norm, mask):
    theirs = torch_encoder(name, norm)
    ours, x = Encoder.from_torch(theirs), torch.randn(B, N, C)
    options = masks(mask)
    exact = {key: m.double() if m is not True and m.is_floating_point() else m
             for key, m in options.items()}  # fmt: skip
    for given in (options, exact):
        if "src_mask" in given:
            given["mask"] = given.pop("src_mask")
    truth = results(copy.deepcopy(theirs).double(), x.double(), **exact)
    with use_backend("reference"):
        same(results(copy.deepcopy(ours).double(), x.double(), **exact), truth, 1e-9)
    within(results(ours, x, **options), results(theirs, x, **options), truth)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    cases.record("Encoder", "auto", torch.float32, name, f"{mask}, norm {norm}")


@pytest.mark.parametrize("name", ["post_norm", "gelu_pre_norm"])
def test_autocast_leaves_float64_alone(name):
    ours, x = Encoder.from_torch(torch_encoder(name, norm=True)).double(), torch.randn(B, N, C)
    expected = ours(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x.double()), expected)


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
@pytest.mark.parametrize("name", ["post_norm", "gelu_pre_norm"])
def test_sixteen_bits(name, how):
    theirs = torch_encoder(name)
    ours, x = Encoder.from_torch(theirs), torch.randn(8, N, C)
    truth = results(copy.deepcopy(theirs).double(), x.double())
    if how == "bfloat16":
        theirs, ours, x = theirs.bfloat16(), ours.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        got, base = results(ours, x), results(theirs, x)
    assert got["out"].dtype == base["out"].dtype
    errors, base = relative_errors(got, truth), relative_errors(base, truth)
    ratios = torch.tensor([errors[key] / base[key] for key in errors if base[key] > 1e-4])
    assert ratios.median() <= 1.1
    assert ratios.max() <= 4, max(errors, key=lambda key: errors[key] / base[key])
    cases.record("Encoder", "auto", torch.bfloat16, name, how)


# --- valid_lens, fully masked rows, causality -----------------------------------------------------


@pytest.mark.parametrize("name", ["post_norm", "pre_norm"])
def test_valid_lens(name):
    block, x = EncoderBlock.from_torch(torch_layer(name)), torch.randn(B, N, C)
    lengths = torch.tensor([N, 5, 9])
    out = block(x, valid_lens=lengths)
    padding = torch.arange(N) >= lengths[:, None]
    assert torch.equal(out, block(x, src_key_padding_mask=padding))
    changed = x.clone()
    changed[1, 5:] = 100.0
    assert torch.equal(block(changed, valid_lens=lengths)[1, :5], out[1, :5])
    assert not torch.allclose(block(changed)[1, :5], out[1, :5])
    # for each query: here those of a causal mask
    causal = torch.arange(1, N + 1).expand(B, N)
    same({"y": block(x, valid_lens=causal)}, {"y": block(x, is_causal=True)})
    # beside a mask both count
    mask = torch.randn(N, N)
    both = mask.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), float("-inf"))
    same({"y": block(x, mask, valid_lens=causal)}, {"y": block(x, both)})
    same({"y": block(x, mask > 2, valid_lens=causal)}, {"y": block(x, (mask > 2) | both.isinf())})


def test_without_keys_a_token_attends_to_nothing():
    theirs = torch_layer()
    block, x = EncoderBlock.from_torch(theirs), torch.randn(2, 4, C)
    out = block(x, valid_lens=torch.tensor([0, 4]))
    attended = theirs.self_attn.out_proj.bias.expand(4, C)
    y = theirs.norm1(x[0] + attended)
    expected = theirs.norm2(y + theirs.linear2(theirs.linear1(y).relu()))
    assert torch.allclose(out[0], expected, atol=1e-5) and out.isfinite().all()


def test_causal_tokens_do_not_see_later_ones():
    encoder, x = Encoder.from_torch(torch_encoder("pre_norm")), torch.randn(1, N, C)
    changed = x.clone()
    changed[:, 7:] += 1
    out, other = (encoder(inp, is_causal=True) for inp in (x, changed))
    assert torch.equal(out[:, :7], other[:, :7]) and not torch.allclose(out[:, 7:], other[:, 7:])


# --- dropout --------------------------------------------------------------------------------------


def test_each_add_and_norm_is_one_call(monkeypatch):
    calls, operator = [], vitkernels.nn.layer_norm.add_layer_norm

    def watched(x, residual, *args, **options):
        calls.append((residual is not None, options["dropout_p"]))
        return operator(x, residual, *args, **options)

    monkeypatch.setattr(vitkernels.nn.layer_norm, "add_layer_norm", watched)
    x = torch.randn(B, N, C)
    block = EncoderBlock.from_torch(torch_layer(dropout=0.25)).train()
    block(x)
    assert calls == [(True, 0.25), (True, 0.25)]
    calls.clear()
    block.eval()(x)
    assert calls == [(True, 0.0), (True, 0.0)]
    calls.clear()
    encoder = Encoder.from_torch(torch_encoder("pre_norm", dropout=0.25)).train()
    encoder(x)  # the first norm has nothing to add; each other takes the add before it
    assert calls == [(False, 0.0)] + [(True, 0.25)] * 6
    calls.clear()
    encoder.layers[1].register_forward_hook(lambda *_: None)
    encoder(x)
    assert calls.count((False, 0.0)) == 4


@pytest.mark.parametrize("part", ["self_attn", "dropout", "dropout1", "dropout2"])
@pytest.mark.parametrize("name", ["post_norm", "pre_norm"])
def test_dropout_of_each_part_scatters_as_torch_s(name, part):
    """Mean and variance over 800 samples of one sequence, of one dropout at a time."""
    theirs, x = torch_layer(name), torch.randn(1, 4, C)
    ours = EncoderBlock.from_torch(theirs)
    moments = []
    for model in (theirs, ours):
        module = getattr(model, part)
        setattr(module, "dropout" if part == "self_attn" else "p", 0.3)
        model.train()
        with torch.no_grad():
            out = model(x.expand(800, -1, -1)).double()
        moments.append((out.mean(0), out.var(0)))
        assert out.var(0).mean() > 1e-4
    (mean, var), (our_mean, our_var) = moments
    z = (our_mean - mean) / (2 * var / 800).sqrt().clamp(min=1e-6)
    assert z.square().mean() < 2 and z.abs().max() < 6
    assert (our_var.mean() / var.mean() - 1).abs() < 0.1


def test_the_fused_mask_is_philox_s():
    block = EncoderBlock.from_torch(torch_layer("pre_norm")).train()
    block.dropout1.p, x = 0.5, torch.randn(B, N, C)
    torch.manual_seed(3)
    out = block(x)
    torch.manual_seed(3)
    kept = keep_mask(torch.randint(0, 2**62, (1,)), (B, N, C), 0.5)
    z = x + 2 * kept * block.self_attn(block.norm1(x))
    expected = z + block.linear2(block.linear1(block.norm2(z)).relu())
    assert torch.allclose(out, expected, atol=1e-5) and 0.4 < kept.float().mean() < 0.6


def test_a_dropout_of_one_drops_everything():
    block, x = EncoderBlock.from_torch(torch_layer("pre_norm")).train(), torch.randn(B, N, C)
    block.dropout1.p = block.dropout2.p = 1.0
    assert torch.equal(block(x), x)


def test_training_learns():
    torch.manual_seed(0)
    encoder = Encoder(EncoderBlock(C, HEADS, 100, dropout=0.1), 2)
    head, x = nn.Linear(C, 5), torch.randn(64, N, C)
    target = x.mean(1)[:, :5].argmax(1)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(head(encoder(x).mean(1)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
