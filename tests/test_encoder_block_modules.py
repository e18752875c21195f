"""EncoderBlock and Encoder as modules: names, initial weights, copies, compiling, bad arguments."""

import copy
import pickle

import pytest
import torch
from encoder_pairs import HEADS, SETTINGS, B, C, N, results, torch_encoder, torch_layer
from torch import nn
from vit_pairs import same

from vitkernels.nn import Encoder, EncoderBlock, LayerNorm


@pytest.mark.parametrize("name", SETTINGS)
def test_names_and_initial_weights_are_torch_s(name):
    models = []
    for cls in (nn.TransformerEncoderLayer, EncoderBlock):
        torch.manual_seed(5)
        models.append(cls(C, HEADS, 100, batch_first=True, **SETTINGS[name]).state_dict())
    expected, got = models
    assert list(got) == list(expected)
    assert all(torch.equal(got[key], expected[key]) for key in got)
    block = EncoderBlock(C, HEADS, 100, **SETTINGS[name])
    block.load_state_dict(expected, strict=True)


@pytest.mark.parametrize("mode", ["eval", "train", "autocast", "padding"])
@pytest.mark.parametrize("name", ["post_norm", "gelu_pre_norm"])
def test_compiles_as_one_graph(name, mode):
    ours = Encoder.from_torch(torch_encoder(name, layers=2, dropout=0.2))
    ours.train(mode == "train")
    x = torch.randn(B, N, C)
    options = {"valid_lens": torch.tensor([N, 5, 9])} if mode == "padding" else {}
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    found = []
    for model in (ours, compiled):
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            got = results(model, x, **options)
        found.append({key.removeprefix("_orig_mod."): value for key, value in got.items()})
    if mode != "train":
        same(found[1], found[0], 2e-2 if mode == "autocast" else 5e-6)
    assert all(value.isfinite().all() for value in found[1].values())


def test_from_torch_copies_and_leaves_the_source_alone():
    theirs = torch_encoder("gelu_pre_norm", dropout=0.2).bfloat16().train()
    theirs.layers[1].linear1.weight.requires_grad_(False)
    theirs.layers[2].eval()
    theirs.layers[0].norm2.eps, theirs.layers[0].dropout1.p = 0.5, 0.7
    theirs.layers[1].self_attn.dropout = 0.4
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    ours = Encoder.from_torch(theirs)
    assert ours.training and ours.layers[1].training and not ours.layers[2].self_attn.training
    assert (ours.layers[0].norm2.eps, ours.layers[0].dropout1.p) == (0.5, 0.7)
    assert [layer.self_attn.dropout for layer in ours.layers] == [0.2, 0.4, 0.2]
    assert isinstance(ours.norm, LayerNorm) and ours.norm.eps == 1e-4
    for (name, mine), (other_name, other) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert name == other_name and torch.equal(mine, other) and mine.dtype == torch.bfloat16
        assert mine.data_ptr() != other.data_ptr() and mine.requires_grad == other.requires_grad
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], t) for name, t in theirs.state_dict().items())


def test_copies_devices_and_dtypes():
    block = EncoderBlock(C, HEADS, 100, device="meta", dtype=torch.float16)
    assert all(p.is_meta and p.dtype == torch.float16 for p in block.parameters())
    assert block(torch.empty(2, N, C, device="meta", dtype=torch.float16)).shape == (2, N, C)
    encoder, x = Encoder.from_torch(torch_encoder()), torch.randn(B, N, C)
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(other(x), encoder(x))
        assert (
            other.layers[0].linear1.weight.data_ptr() != encoder.layers[0].linear1.weight.data_ptr()
        )
    fresh = Encoder(EncoderBlock(C, HEADS, 100), 2)
    first, second = fresh.layers
    assert torch.equal(first.linear1.weight, second.linear1.weight)
    assert first.linear1.weight is not second.linear1.weight


@pytest.mark.parametrize("hooked", ["norm1", "dropout1", "self_attn", "linear1", "activation"])
@pytest.mark.parametrize("name", ["post_norm", "gelu_pre_norm"])
def test_hooks_see_the_modules(name, hooked):
    block, x, seen = EncoderBlock.from_torch(torch_layer(name)), torch.randn(B, N, C), []
    expected = block(x)
    getattr(block, hooked).register_forward_hook(lambda m, args, out: seen.append(out))
    same({"y": block(x)}, {"y": expected})
    assert len(seen) == 1 and isinstance(seen[0], torch.Tensor)


# --- bad arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"d_model": 0}, "d_model must be a positive integer, got 0"),
        ({"nhead": 5}, "d_model must be a multiple of nhead, got 48 and 5"),
        ({"nhead": "4"}, "nhead must be a positive integer, got str"),
        ({"dim_feedforward": -1}, "dim_feedforward must be a positive integer"),
        ({"dropout": 1.0}, r"dropout must be a probability in \[0, 1\)"),
        ({"batch_first": False}, r"batch_first must be True: inputs are \(B, N, d_model\)"),
        ({"activation": "swish"}, "activation must be relu or gelu"),
        ({"activation": torch.tanh}, "activation must be relu or gelu"),
    ],
)
def test_bad_constructor_arguments(arguments, sentence):
    with pytest.raises((ValueError, TypeError), match=f"EncoderBlock: {sentence}") as error:
        EncoderBlock(**{"d_model": C, "nhead": HEADS, **arguments})
    assert "\n" not in str(error.value)


X = (B, N, C)
BAD_CALLS = [
    ((torch.zeros(N, C),), {}, ValueError, r"src must be of shape \(B, N, 48\)"),
    ((torch.zeros(B, N, 40),), {}, ValueError, r"src must be of shape \(B, N, 48\)"),
    ((torch.zeros(X, dtype=torch.int64),), {}, TypeError, "src must be a dense float tensor"),
    ((None,), {}, TypeError, "src must be a dense float tensor"),
    ((torch.nested.nested_tensor([torch.zeros(3, C)]),), {}, TypeError, "got a nested tensor"),
    ((torch.zeros(X), torch.zeros(N, 4)), {}, ValueError, r"src_mask must be of shape \(13, 13\)"),
    ((torch.zeros(X), torch.zeros(N, N).int()), {}, TypeError, "src_mask must be a bool or float"),
    ((torch.zeros(X), torch.zeros(B, N, N)), {}, ValueError, r"or \(12, 13, 13\)"),
    (
        (torch.zeros(X),),
        {"src_key_padding_mask": torch.zeros(N, B).bool()},
        ValueError,
        r"src_key_padding_mask must be of shape \(3, 13\)",
    ),
    ((torch.zeros(X),), {"valid_lens": torch.ones(B)}, TypeError, "valid_lens must be an int32"),
    ((torch.zeros(X),), {"valid_lens": [1, 2, 3]}, TypeError, "valid_lens must be an int32"),
    (
        (torch.zeros(X),),
        {"valid_lens": torch.ones(4).int()},
        ValueError,
        r"valid_lens must be of shape \(3,\) or \(3, 13\)",
    ),
    (
        (torch.zeros(X),),
        {"valid_lens": torch.ones(B).int(), "src_key_padding_mask": torch.zeros(B, N).bool()},
        ValueError,
        "valid_lens must be None beside src_key_padding_mask",
    ),
]  # fmt: skip


@pytest.mark.parametrize("args, options, error, sentence", BAD_CALLS)
def test_bad_calls(args, options, error, sentence):
    block = EncoderBlock(C, HEADS, 100)
    with pytest.raises(error, match=f"EncoderBlock: .*{sentence}") as caught:
        block(*args, **options)
    assert "\n" not in str(caught.value)


def test_from_torch_names_what_it_does_not_take():
    layer = torch_layer()
    layer.activation = torch.tanh
    refusals = [
        (EncoderBlock, nn.Linear(2, 2), "must be a torch.nn.TransformerEncoderLayer, got Linear"),
        (EncoderBlock, nn.TransformerEncoderLayer(C, HEADS), "must have batch_first=True"),
        (EncoderBlock, layer, "activation must be relu or gelu"),
        (Encoder, torch_layer(), "must be a torch.nn.TransformerEncoder, got"),
        (Encoder, nn.TransformerEncoder(torch_layer(), 1, nn.Identity()), "the last norm must be"),
    ]
    for cls, source, sentence in refusals:
        with pytest.raises(ValueError, match=sentence) as error:
            cls.from_torch(source)
        assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match="must be an EncoderBlock"):
        Encoder(torch_layer(), 2)
    with pytest.raises(ValueError, match="num_layers must be a positive integer"):
        Encoder(EncoderBlock(C, HEADS), 0)
