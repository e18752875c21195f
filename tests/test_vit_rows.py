"""With class-token pooling the last block computes only what the head reads: exactly the same."""

from types import MethodType

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from vit_pairs import images, logits_and_grads, needs_timm, pair, same

from vitkernels import FusedViT, use_backend
from vitkernels.nn import Attention, LayerNorm

pytestmark = pytest.mark.skipif(**needs_timm)


def spy(monkeypatch) -> list[int]:
    """The rows that attentions were asked for."""
    seen, first_rows = [], Attention._first_rows

    def watched(self, x, rows):
        seen.append(rows)
        return first_rows(self, x, rows)

    monkeypatch.setattr(Attention, "_first_rows", watched)
    return seen


class Flops(TorchDispatchMode):
    """Counts as FlopCounterMode does, but without hooks on modules."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def nobody(*_):
    """A hook that does nothing, and makes the model pass Tensors of all tokens."""


CLASS_TOKEN = [
    "class_token", "registers_layer_scale", "no_embed_class", "clip", "no_biases", "qk_norm",
    "sub_norms", "dynamic_size", "gray_not_square", "wide_heads",
]  # fmt: skip


@pytest.mark.parametrize("name", CLASS_TOKEN)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_logits_and_gradients_are_those_of_all_rows(name, mode, monkeypatch):
    drop = {"drop_path_rate": 0.5} if mode == "train" else {}
    _, ours = pair(name, drop_rate=0.2 if drop else 0.0, **drop)
    ours.train(mode == "train")
    x, seen = images(name, batch=4), spy(monkeypatch)
    torch.manual_seed(8)
    got = logits_and_grads(ours, x)
    assert seen == [1]
    ours.blocks[0].register_forward_hook(nobody)
    torch.manual_seed(8)
    expected = logits_and_grads(ours, x)
    assert seen == [1]
    same(got, expected)
    assert all(value is not None for value in got.values())


def test_the_products_of_the_other_rows_are_not_computed():
    B, N, C, hidden = 2, 65, 192, 768
    model = FusedViT(64, 8, embed_dim=C, depth=12, num_heads=3, num_classes=10)
    x, flops = torch.randn(B, 3, 64, 64), []
    for _ in range(2):
        with use_backend("torch"), Flops() as counter:
            model(x)
        flops.append(counter.total)
        model.blocks[0].register_forward_hook(nobody)
    q_and_proj, mlp = 2 * 2 * C * C, 2 * 2 * C * hidden  # the attention itself is not counted
    assert flops[1] - flops[0] == B * (N - 1) * (q_and_proj + mlp)
    assert 0.06 < 1 - flops[0] / flops[1] < 0.08


def test_features_keep_all_tokens(monkeypatch):
    theirs, ours = pair("registers_layer_scale")
    x, seen = images(), spy(monkeypatch)
    same({"y": ours.forward_features(x)}, {"y": theirs.forward_features(x)})
    assert seen == []


class OtherPool(FusedViT):
    def pool(self, x, pool_type=None):
        return x[:, -1]


class OtherFeatures(FusedViT):
    def forward_features(self, x, attn_mask=None, is_causal=False):
        return super().forward_features(x, attn_mask, is_causal).flip(1)


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


class TokenMixer(nn.Module):
    def forward(self, x):
        return x + x.mean(dim=1, keepdim=True)


CHANGES = {
    "hook on the block": lambda m: m.blocks[-1].register_forward_hook(nobody),
    "hook on a norm": lambda m: m.blocks[-1].norm2.register_forward_hook(nobody),
    "hook on an activation": lambda m: m.blocks[-1].mlp.act.register_forward_pre_hook(nobody),
    "hook on the projection": lambda m: m.blocks[-1].attn.qkv.register_full_backward_hook(nobody),
    "hook on the last norm": lambda m: m.norm.register_forward_hook(nobody),
    "mixing norm": lambda m: replace(m, "blocks.2.norm2", TokenMixer()),
    "mixing last norm": lambda m: replace(m, "norm", TokenMixer()),
    "mixing activation": lambda m: replace(m, "blocks.2.mlp.act", TokenMixer()),
    "another qkv": lambda m: replace(m, "blocks.2.attn.qkv", nn.Linear(48, 144)),
    "forward of one module": lambda m: setattr(m.blocks[-1].norm2, "forward", TokenMixer()),
    "average pooling": lambda m: m.reset_classifier(5, "avg"),
    "no pooling": lambda m: m.reset_classifier(0, ""),
    "checkpointing": lambda m: m.set_grad_checkpointing(),
    "active dropout": lambda m: (m.train(), setattr(m.blocks[-1].mlp.drop1, "p", 0.5)),
    "dropout of attention, its module at rest": lambda m: (
        m.train(),
        setattr(m.blocks[-1].attn.attn_drop, "p", 0.5),
        m.blocks[-1].attn.attn_drop.eval(),
    ),
    "another pool": lambda m: setattr(m, "__class__", OtherPool),
    "other features": lambda m: setattr(m, "__class__", OtherFeatures),
}


@pytest.mark.parametrize("change", CHANGES)
def test_all_rows_are_computed_where_somebody_may_see_them(change, monkeypatch):
    _, ours = pair()
    CHANGES[change](ours)
    x, seen = images(), spy(monkeypatch)
    torch.manual_seed(2)
    got = ours(x)
    assert seen == []
    ours.blocks[0].register_forward_hook(nobody)
    torch.manual_seed(2)
    same({"y": got}, {"y": ours(x)})


METHODS = {
    "pool": lambda self, x, pool_type=None: x.mean(dim=1),
    "forward_head": lambda self, x, pre_logits=False: self.head(x.mean(dim=1)),
    "forward_features": lambda self, x, attn_mask=None, is_causal=False: 2 * self.norm(
        self.blocks(self._pos_embed(self.patch_embed(x)))
    ),
    "_pos_embed": lambda self, x: torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_methods_replaced_on_one_model_are_called(name):
    theirs, ours = pair()
    for model in (theirs, ours):
        setattr(model, name, MethodType(METHODS[name], model))
    x = images()
    same({"y": ours(x)}, {"y": theirs(x)}, 2e-5)


@pytest.mark.parametrize("mask", [{"attn_mask": torch.ones(17, 17).bool()}, {"is_causal": True}])
def test_masks_compute_all_rows(mask, monkeypatch):
    _, ours = pair()
    seen = spy(monkeypatch)
    ours(images(), **mask)
    assert seen == []


def test_known_modules_may_be_replaced(monkeypatch):
    theirs, ours = pair()
    for model in (theirs, ours):
        model.blocks[2].norm2 = nn.Identity()
        model.blocks[2].mlp.fc2 = nn.Linear(192, 48)
        model.norm = nn.LayerNorm(48)
    ours.load_state_dict(theirs.state_dict())
    x, seen = images(), spy(monkeypatch)
    same(logits_and_grads(ours, x), logits_and_grads(theirs, x), 2e-5)
    assert seen == [1]
    ours.norm = LayerNorm(48)
    ours(x)
    assert seen == [1, 1]
