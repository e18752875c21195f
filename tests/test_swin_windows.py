"""Off the window grid: what timm, torchvision, Hugging Face and OpenMMLab do, written out."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from swin_pairs import images, logits_and_grads, needs_timm, pair, same, settings
from torch import Tensor, nn

from vitkernels import FusedSwin

needs_timm = pytest.mark.skipif(**needs_timm)


def attention_by_address(attn: nn.Module, x: Tensor, window, shift, labels: Tensor) -> Tensor:
    """Window attention of a padded map, row by row of its rolled copy: tokens of one window and one
    label attend to each other."""
    B, H, W, _ = x.shape
    (Wh, Ww), (dy, dx) = window, shift
    heads = attn.num_heads
    q, k, v = F.linear(x, *_qkv(attn)).unflatten(-1, (3, heads, -1)).unbind(3)
    table = attn.bias_table().unflatten(0, (2 * Wh - 1, 2 * Ww - 1))
    out = torch.empty_like(q)
    for top in range(0, H, Wh):
        for left in range(0, W, Ww):
            places = [(top + i, left + j) for i in range(Wh) for j in range(Ww)]
            here = [((y + dy) % H, (x_ + dx) % W) for y, x_ in places]
            ys, xs = torch.tensor(here).T
            qw, kw, vw = (t[:, ys, xs].transpose(1, 2) for t in (q, k, v))  # (B, heads, N, D)
            if attn.logit_scale is None:
                scores = qw @ kw.mT * attn.scale
            else:
                factor = attn.logit_scale.clamp(max=math.log(100.0)).exp()
                scores = F.normalize(qw, dim=-1) @ F.normalize(kw, dim=-1).mT * factor
            rows, columns = torch.tensor(places).T
            bias = table[
                rows[:, None] - rows[None] + Wh - 1, columns[:, None] - columns[None] + Ww - 1
            ]
            together = labels[rows, columns][:, None] == labels[rows, columns][None]
            scores = (scores + bias.permute(2, 0, 1)).masked_fill(~together, -torch.inf)
            out[:, ys, xs] = (scores.softmax(-1) @ vw).transpose(1, 2)
    return attn.proj(out.flatten(3))


def _qkv(attn):
    if attn.logit_scale is None:
        return attn.qkv.weight, attn.qkv.bias
    return attn.qkv.weight, torch.cat((attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias))


def pad_then_roll(attn: nn.Module, x: Tensor, window, shift) -> Tensor:
    """torchvision's and Hugging Face's: zeros at the bottom and right, then the roll. Labels are
    those of the slices (0, -window, -shift, end) of the rolled map."""
    H, W = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -W % window[1], 0, -H % window[0]))
    labels = torch.zeros(x.shape[1:3])
    if any(shift):
        for axis in (0, 1):
            if shift[axis]:
                size = x.shape[1 + axis]
                strip = torch.zeros(size)
                strip[size - window[axis] :] = 1
                strip[size - shift[axis] :] = 2
                labels += strip[:, None] * 3 if axis == 0 else strip[None]
    return attention_by_address(attn, x, window, shift, labels)[:, :H, :W]


def torchvision_rule(block, size) -> tuple:
    window, shift = block.window_size, list(block.target_shift_size)
    for axis in (0, 1):
        if window[axis] >= size[axis] + -size[axis] % window[axis]:
            shift[axis] = 0
    return window, tuple(shift)


def huggingface_rule(block, size) -> tuple:
    window = block.window_size[0]
    shift = 0 if min(size) <= window or not any(block.target_shift_size) else window // 2
    return (window, window), (shift, shift)


def openmmlab_rule(block, size) -> tuple:
    return block.window_size, block.target_shift_size


RULES = {
    "pad": torchvision_rule,
    "min": huggingface_rule,
    "always": openmmlab_rule,
}


@torch.no_grad()
def plain_forward(model: FusedSwin, x: Tensor, rule) -> Tensor:
    """The stages of a FusedSwin by stock operators."""
    x = model.patch_embed(x)
    for stage in model.layers:
        if not isinstance(stage.downsample, nn.Identity):
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
            merge, merged = stage.downsample, torch.cat(parts, dim=-1)
            if model.version == 1:
                x = merge.reduction(merge.norm(merged))
            else:
                x = merge.norm(merge.reduction(merged))
        for block in stage.blocks:
            where = rule(block, tuple(x.shape[1:3]))
            if model.version == 1:
                x = x + pad_then_roll(block.attn, block.norm1(x), *where)
                x = x + block.mlp(block.norm2(x))
            else:
                x = x + block.norm1(pad_then_roll(block.attn, x, *where))
                x = x + block.norm2(block.mlp(x))
    return model.norm(x)


def random_swin(**more) -> FusedSwin:
    model = FusedSwin(**settings(**{"strict_img_size": False, **more})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("built, size", [
    ((64, 64), (64, 64)), ((64, 64), (68, 76)), ((64, 64), (44, 100)), ((100, 44), (64, 28)),
])  # fmt: skip
def test_rules_of_other_libraries(version, rule, built, size):
    clamp = {} if rule == "always" else {"window_clamp": rule}
    model = random_swin(
        img_size=built, window_size=4, version=version, always_partition=rule == "always", **clamp
    )
    x = torch.randn(2, 3, *size).double()
    with torch.no_grad():
        got, expected = model.forward_features(x), plain_forward(model, x, RULES[rule])
    assert (got - expected).norm() < 1e-12 * expected.norm()


def test_shift_is_dropped_where_the_padded_map_is_one_window():
    block = random_swin(window_size=4, window_clamp="pad").layers[0].blocks[1]
    assert block.shift_size == (2, 2)
    assert block.windows(3, 5) == ((4, 4), (0, 2), (1, 3), False)
    assert block.windows(4, 4) == ((4, 4), (0, 0), (0, 0), False)
    block = random_swin(window_size=4, window_clamp="min").layers[0].blocks[1]
    assert block.windows(3, 9).shift == block.windows(4, 9).shift == (0, 0)
    assert block.windows(5, 9).shift == (2, 2)
    block = random_swin(window_size=4, window_clamp="min", img_size=16).layers[0].blocks[1]
    assert block.shift_size == (0, 0)  # of the size it was made for
    assert block.windows(8, 8).shift == (2, 2)  # of the map at hand


@needs_timm
@pytest.mark.parametrize("config", ["v1", "v2"])
@pytest.mark.parametrize(
    "built, size", [((64, 64), (68, 76)), ((64, 64), (44, 100)), ((60, 44), (64, 28))]
)
def test_any_image_size_as_timm(config, built, size):
    theirs, ours = (m.double() for m in pair(config, img_size=built, dynamic_img_size=True))
    x = torch.randn(2, 3, *size).double()
    same(logits_and_grads(ours, x), logits_and_grads(theirs, x), 1e-9)


OFF_GRID = {"pad_mode": ["pad_roll", "timm"], "window_clamp": ["axis", "min", "pad"]}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("pad_mode", OFF_GRID["pad_mode"])
@pytest.mark.parametrize("window_clamp", OFF_GRID["window_clamp"])
def test_a_forward_changes_nothing(version, pad_mode, window_clamp):
    """The first image size seen does not change the second's result."""
    model = random_swin(
        window_size=4, version=version, pad_mode=pad_mode, window_clamp=window_clamp
    )
    small, large = (torch.randn(1, 3, *size).double() for size in ((12, 20), (72, 52)))
    before = copy.deepcopy(model)(large)
    attributes = {name: repr(vars(m)) for name, m in model.named_modules()}
    model(small)
    assert torch.equal(model(large), before)
    assert {name: repr(vars(m)) for name, m in model.named_modules()} == attributes


@needs_timm
@pytest.mark.parametrize(
    "name", ["v1", "v1_odd_maps", "v1_s3", "v2", "v2_not_square", "v2_pretrained"]
)
@pytest.mark.parametrize("change", [
    {}, {"img_size": 96}, {"img_size": (48, 80)}, {"window_size": 5}, {"window_size": (3, 6)},
    {"window_size": (2, (4, 3), 3)}, {"window_ratio": 4}, {"window_ratio": (4, 2, 8)},
    {"patch_size": 2}, {"img_size": (64, 96), "always_partition": True},
    {"img_size": 32, "patch_size": (8, 4), "window_ratio": 2},
], ids=str)  # fmt: skip
def test_set_input_size_as_timm(name, change):
    theirs, ours = pair(name)
    for model in (theirs, ours):
        model.set_input_size(**change)
        model.set_input_size(**change)
    assert ours.feature_info == theirs.feature_info
    assert ours._ref_window_sizes == theirs._ref_window_sizes
    assert ours._ref_grid_size == theirs._ref_grid_size
    for mine, their in zip(ours.layers, theirs.layers, strict=True):
        assert mine.input_resolution == their.input_resolution
        assert mine.output_resolution == their.output_resolution
        for a, b in zip(mine.blocks, their.blocks, strict=True):
            for attribute in ("window_size", "shift_size", "window_area", "input_resolution"):
                assert getattr(a, attribute) == getattr(b, attribute)
    expected = theirs.state_dict()
    for key, value in ours.state_dict().items():
        assert torch.allclose(value, expected[key], rtol=1e-5, atol=1e-6), key
    ours.load_state_dict(expected)
    x = torch.randn(1, 3, *ours.patch_embed.img_size)
    with torch.no_grad():
        same({"y": ours(x)}, {"y": theirs(x)})


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"window_size": (7, 7, 7, 7)}, "window_size must be a positive integer, a pair, or"),
        ({"window_size": 0}, "window_size must be a positive integer"),
        ({"window_ratio": (4, 2)}, "window_ratio must be a positive integer, or one for each of 3"),
        ({"window_ratio": 0}, "window_ratio must be a positive integer"),
    ],
)
def test_bad_input_sizes_change_nothing(arguments, sentence):
    model = random_swin(window_size=4)
    x = torch.randn(1, 3, 64, 64).double()
    before = model(x)
    with pytest.raises((TypeError, ValueError), match=f"^set_input_size: {sentence}") as error:
        model.set_input_size(img_size=96, **arguments)
    assert "\n" not in str(error.value)
    assert torch.equal(model(x), before)


@needs_timm
@pytest.mark.parametrize("name", ["v1", "v1_odd_maps", "v1_odd_windows", "v2", "v2_odd_maps"])
@pytest.mark.parametrize("pad_mode", ["timm", "pad_roll"])
def test_attention_maps_reproduce_the_attention(name, pad_mode):
    model = FusedSwin(**settings(name), pad_mode=pad_mode).eval()
    x, passed = images(name), []
    blocks = [block for stage in model.layers for block in stage.blocks]
    for block in blocks:
        block.attn.register_forward_hook(lambda m, args, out: passed.append((args[0], out)))
    with torch.no_grad():
        model(x)
        maps = model.attention_maps(x)
        for block, found, (inp, out) in zip(blocks, maps, passed, strict=False):
            B, H, W, C = inp.shape
            assert found.size == (H, W) and found.window == block.window_size
            assert found.weights.shape[:2] == (B, len(found.tokens))
            assert torch.allclose(found.weights.sum(-1), torch.ones(()), atol=1e-5)
            padded = F.pad(inp.flatten(1, 2), (0, 0, 0, 1))  # token -1: zeros
            v = F.linear(padded, *_qkv(block.attn))[..., -C:][:, found.tokens]
            v = v.unflatten(-1, (block.attn.num_heads, -1)).transpose(2, 3)
            again = torch.zeros(B, H * W + 1, C)
            again[:, found.tokens] = (found.weights @ v).transpose(2, 3).flatten(3)
            again = block.attn.proj(again[:, :-1].unflatten(1, (H, W)))
            assert torch.allclose(again, out, atol=1e-5)
            counts = torch.bincount(found.tokens[found.tokens >= 0], minlength=H * W)
            assert (counts == 1).all()
    assert not any(block.attn._forward_pre_hooks for block in blocks)
