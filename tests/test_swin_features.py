"""What people do with a FusedSwin besides calling it: compiling, copying, methods, images."""

import copy

import pytest
import torch
from model_checks import (
    COPIES,
    check_checkpointing,
    check_copy,
    check_dynamic_batch,
    check_export,
    check_frozen,
    check_functional_gradients,
    check_intermediates,
    check_one_graph,
)
from swin_pairs import FAST, images, logits_and_grads, needs_timm, pair, same, settings
from torch import nn

from vitkernels import FusedSwin
from vitkernels.models import FeaturePyramid

pytestmark = pytest.mark.skipif(**needs_timm)
SHALLOW = {
    "v1": {"depths": (2, 1), "num_heads": (1, 2)},
    "v2": {"depths": (2, 1), "num_heads": (1, 2)},
    "v1_odd_maps": {"depths": (2, 1), "num_heads": (1, 2)},
}


# --- checkpointing, compiling, copying ------------------------------------------------------------


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_gradient_checkpointing_changes_nothing(name):
    _, ours = pair(name, drop_path_rate=0.4, attn_drop_rate=0.2, proj_drop_rate=0.1)
    check_checkpointing(ours, images(name, batch=4))


@pytest.mark.parametrize(
    "name, mode",
    [
        ("v1", "train"),
        ("v1", "checkpointing"),
        ("v2", "train"),
        ("v2", "autocast"),
    ],
)
def test_compiles_as_one_graph(name, mode):
    _, ours = pair(name, drop_path_rate=0.3, attn_drop_rate=0.1, **SHALLOW[name])
    check_one_graph(ours, images(name, batch=3), mode)


def test_dynamic_batch_compiles_once():
    _, ours = pair("v1", **SHALLOW["v1"])
    check_dynamic_batch(ours, (images("v1", batch=batch) for batch in (2, 3, 5, 7)))


def test_sizes_may_change_under_compile():
    _, ours = pair("v1", strict_img_size=False, **SHALLOW["v1"])
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for size in ((64, 64), (52, 76), (96, 40)):
            x = torch.randn(1, 3, *size)
            same({"y": compiled(x)}, {"y": ours(x)})


@pytest.mark.parametrize("name", ["v1_odd_maps", "v2"])
def test_torch_export(name):
    check_export(pair(name, **SHALLOW[name])[1], images(name))


@pytest.mark.parametrize("how", [*COPIES, "meta"])
@pytest.mark.parametrize("name", ["v1", "v2"])
def test_copies(name, how):
    def another():
        if how == "state_dict":
            return pair(name)[1]
        model = FusedSwin(**settings(name), pad_mode="timm", device="meta").eval()
        return model.to_empty(device="cpu")

    check_copy(pair(name)[1], images(name), how, another)


def test_position_biases_of_v2_follow_their_parameters():
    """Nothing about the table is kept from one forward to the next."""
    _, ours = pair("v2", depths=(1,), num_heads=(1,))
    attn, x = ours.layers[0].blocks[0].attn, images("v2")
    with torch.no_grad():
        before = ours(x)
        attn.cpb_mlp[2].weight.mul_(-1.0)
        assert not torch.equal(ours(x), before)
        attn.cpb_mlp[2].weight.mul_(-1.0)
        assert torch.equal(ours(x), before)
    halved = copy.deepcopy(ours).bfloat16().float()  # coordinates are never rounded twice
    table = halved.layers[0].blocks[0].attn.relative_coords_table
    assert torch.equal(table, attn.relative_coords_table)
    buffers = dict(ours.named_buffers())
    assert not set(buffers) & set(ours.state_dict())
    assert {"layers.0.blocks.0.attn.k_bias"} < set(buffers)


def test_functional_gradients():
    check_functional_gradients(pair("v1", **SHALLOW["v1"])[1], images())


def test_frozen_parameters_get_no_gradient():
    check_frozen(pair("v1", **SHALLOW["v1"])[1], images(), ("head", "bias_table"))


def test_uint8_images():
    _, ours = pair("v1")
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (x / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    same({"y": ours(x)}, {"y": ours(normalised)})
    gray = FusedSwin(**settings("v1", in_chans=1))
    assert gray.patch_embed.mean.tolist() == pytest.approx([0.449])


# --- timm's methods -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"indices": 2, "norm": True},
        {"indices": [0, -1]},
        {"indices": [1], "stop_early": True},
        {"indices": (0, 1), "intermediates_only": True, "norm": True},
        {"indices": 1, "stop_early": True, "norm": True},
    ],
)
@pytest.mark.parametrize("name", ["v1_odd_maps", "v2"])
def test_forward_intermediates(name, options):
    theirs, ours = pair(name)
    x = images(name)
    check_intermediates(theirs, ours, x, options)
    _, maps = ours.forward_intermediates(x, output_fmt="NHWC")
    _, nchw = ours.forward_intermediates(x)
    assert all(m.is_contiguous() for m in nchw)
    assert all(torch.equal(a.permute(0, 3, 1, 2), b) for a, b in zip(maps, nchw, strict=True))


@pytest.mark.parametrize("indices", [1, [0], [0, 1], [1, 2]])
@pytest.mark.parametrize("flags", [{}, {"prune_norm": True}, {"prune_head": False}])
@pytest.mark.parametrize("name", ["v1", "v2"])
def test_pruning(name, indices, flags):
    theirs, ours = pair(name)
    x = images(name)
    taken = [m.prune_intermediate_layers(indices, **flags) for m in (theirs, ours)]
    assert taken[1] == taken[0]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for attribute in ("num_features", "head_hidden_size", "_ref_window_sizes", "num_classes"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    same({"y": ours(x)}, {"y": theirs(x)})
    for model in (theirs, ours):
        model.set_input_size(img_size=(32, 96))
        model.reset_classifier(3, "avg")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 96)
    same({"y": ours(x)}, {"y": theirs(x)})


@pytest.mark.parametrize("name", ["v1", "v1_features", "v2"])
@pytest.mark.parametrize("pool", [None, "", "avg", "max", "avgmax", "catavgmax"])
def test_another_classifier(name, pool):
    theirs, ours = pair(name)
    x = images(name)
    pooled = [m.forward_head(m.forward_features(x), pre_logits=True) for m in (theirs, ours)]
    same({"y": pooled[1]}, {"y": pooled[0]})
    for model in (theirs, ours):
        model.reset_classifier(4, pool)
    ours.head.load_state_dict(theirs.head.state_dict())
    same(logits_and_grads(ours, x), logits_and_grads(theirs, x), 2e-5)
    for attribute in ("num_classes", "global_pool", "head_hidden_size"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert ours.get_classifier() is ours.head.fc
    for model in (theirs, ours):
        model.train().reset_classifier(0, pool)
        assert isinstance(model.get_classifier(), nn.Identity)
    assert ours.head.fc.training
    same({"y": ours.eval()(x)}, {"y": theirs.eval()(x)})


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_what_optimizers_ask(name):
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    theirs, ours = pair(name)
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    for coarse in (False, True):
        assert ours.group_matcher(coarse) == theirs.group_matcher(coarse)
    assert ours.feature_info == theirs.feature_info
    for make in (param_groups_weight_decay, param_groups_layer_decay):
        expected, got = make(theirs, 0.05), make(ours, 0.05)
        assert [len(g["params"]) for g in got] == [len(g["params"]) for g in expected]


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("indices", [None, (0, 2), 2, (1,)])
def test_feature_pyramid(norms, indices):
    theirs, ours = pair("v1_odd_maps")
    x = images("v1_odd_maps")
    expected = theirs.forward_intermediates(x, indices, intermediates_only=True)
    pyramid = FeaturePyramid(ours, indices, norms=norms)
    maps = pyramid(x)
    assert pyramid.channels == [m.shape[1] for m in maps] and len(maps) == len(expected)
    assert pyramid.reductions == [4 * 2 ** pyramid.indices[i] for i in range(len(maps))]
    for got, truth in zip(maps, expected, strict=True):
        if norms:
            truth = nn.functional.layer_norm(truth.permute(0, 2, 3, 1), truth.shape[1:2])
            truth = truth.permute(0, 3, 1, 2)
        same({"y": got}, {"y": truth})
    names = {name.split(".")[0] for name in pyramid.state_dict()}
    assert names == {"model"} | {f"norm{i}" for i in pyramid.indices} if norms else {"model"}
    sum(m.sum() for m in maps).backward()


# --- bad arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"img_size": 0}, "img_size must be a positive integer"),
        ({"patch_size": (4, 0)}, "patch_size must be a positive integer"),
        ({"global_pool": "token"}, "global_pool must be one of '', 'avg'"),
        ({"embed_dim": 0}, "embed_dim must be a positive integer"),
        ({"embed_dim": (32, 64)}, "embed_dim must be one value or one for each of 3 stages"),
        ({"num_heads": (3, 2, 4)}, "embed_dim must be a multiple of num_heads"),
        ({"depths": ()}, "depths must be one number of blocks for each stage"),
        ({"depths": (2, 0, 2)}, "depths must be a positive integer"),
        ({"depths": 2}, "depths must be one number of blocks for each stage"),
        ({"num_heads": (1, 2)}, "num_heads must be one for each of 3 stages"),
        ({"num_heads": 3}, "num_heads must be one for each of 3 stages"),
        ({"num_heads": (1, 2, -4)}, "num_heads must be a positive integer"),
        ({"head_dim": 0}, "head_dim must be a positive integer"),
        ({"head_dim": 16, "version": 2}, "head_dim must be None with version=2"),
        ({"window_size": 0}, "window_size must be a positive integer"),
        ({"window_size": 7.0}, "window_size must be a positive integer"),
        ({"window_size": (7, 7, 7, 7)}, "window_size must be .* each of 3 stages"),
        ({"window_size": (4, 6), "window_clamp": "min"}, "window_size must be square"),
        ({"mlp_ratio": 0}, "mlp_ratio must be a positive number"),
        ({"drop_rate": 1.5}, "drop_rate must be a probability"),
        ({"attn_drop_rate": 1.0}, "attn_drop_rate must be a probability"),
        ({"proj_drop_rate": -0.1}, "proj_drop_rate must be a probability"),
        ({"drop_path_rate": "0.1"}, "drop_path_rate must be a probability"),
        ({"norm_layer": "batchnorm"}, "norm_layer must be one of LayerNorm"),
        ({"act_layer": nn.ReLU}, "act_layer must be one of GELU"),
        ({"embed_layer": nn.Conv2d}, "embed_layer must be one of PatchEmbed"),
        ({"pretrained_window_sizes": (8,), "version": 2}, "pretrained_window_sizes must be one"),
        ({"pretrained_window_sizes": 8, "version": 2}, "pretrained_window_sizes must be one"),
        ({"weight_init": "xavier"}, "weight_init must be one of"),
        ({"version": 3}, "version must be one of 1, 2"),
        ({"pad_mode": "zeros"}, "pad_mode must be one of 'pad_roll', 'timm'"),
        ({"window_clamp": "both"}, "window_clamp must be one of 'axis', 'min', 'pad'"),
        ({"std": 0.0}, "std must be above 0"),
        ({"mean": (0.5, 0.5)}, "mean must be a float or 3 floats"),
        ({"img_size": None}, "img_size must be a positive integer, got NoneType"),
        ({"img_size": 224.0}, "img_size must be a positive integer, got float"),
        ({"img_size": (64,)}, r"img_size must be one size or \(height, width\), got tuple"),
        ({"img_size": 3}, r"img_size must be at least patch_size = \(4, 4\), got \(3, 3\)"),
        ({"patch_size": (4, 4, 4)}, r"patch_size must be one size or \(height, width\)"),
        ({"in_chans": 0}, "in_chans must be a positive integer"),
        ({"num_classes": -1}, "num_classes must be an integer of at least 0, got -1"),
        ({"num_classes": None}, "num_classes must be an integer of at least 0, got NoneType"),
        ({"embed_dim": None}, "embed_dim must be a positive integer, got NoneType"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio must be a positive number"),
        ({"pretrained_window_sizes": ("a", 0, 0), "version": 2}, "pretrained_window_sizes must be"),
        ({"pretrained_window_sizes": (0, (4, -1), 0)}, "pretrained_window_sizes must be"),
    ],
    ids=str,
)
def test_bad_constructor_arguments(arguments, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence) as error:
        FusedSwin(**settings("v1", **arguments), device="meta")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arguments, sentence", [
    ({"img_size": 0}, "img_size must be a positive integer, got 0"),
    ({"img_size": (3, 64)}, r"img_size must be at least patch_size = \(4, 4\), got \(3, 64\)"),
    ({"img_size": "64"}, "img_size must be a positive integer, got str"),
    ({"img_size": (64,)}, "img_size must be one size or"),
    ({"patch_size": 0}, "patch_size must be a positive integer, got 0"),
    ({"patch_size": "a"}, "patch_size must be a positive integer, got str"),
    ({"patch_size": 128}, "img_size must be at least patch_size"),
    ({"img_size": 32, "window_size": 0}, "window_size must be a positive integer"),
    ({"img_size": 32, "window_ratio": 0}, "window_ratio must be a positive integer"),
    ({"window_size": (2, 4), "window_clamp": "min"}, "window_size must be square"),
], ids=str)  # fmt: skip
def test_a_refused_input_size_changes_nothing(arguments, sentence):
    arguments = dict(arguments)
    ours = FusedSwin(**settings("v1", window_clamp=arguments.pop("window_clamp", "axis"))).eval()
    x = images()
    before = ours(x)
    with pytest.raises((TypeError, ValueError), match=sentence):
        ours.set_input_size(**arguments)
    assert torch.equal(ours(x), before)
    ours.set_input_size(32)  # windows are in proportion to what was there before
    assert [stage.blocks[0].window_size for stage in ours.layers] == [(2, 2)] * 3


def test_windows_of_microsofts_clamp_stay_square():
    ours = FusedSwin(**settings("v1", window_clamp="min")).eval()
    ours.set_input_size((64, 128))
    assert {block.window_size for stage in ours.layers for block in stage.blocks} == {(4, 4)}
    assert ours(torch.randn(1, 3, 64, 128)).isfinite().all()
    ours.set_input_size((128, 256), window_ratio=8)
    assert {block.window_size for stage in ours.layers for block in stage.blocks} == {(4, 4)}


@pytest.mark.parametrize("name", FAST)
def test_shapes_without_storage(name):
    ours = FusedSwin(**settings(name), device="meta")
    logits = ours(images(name).to("meta"))
    assert logits.shape == (2, 10)
    logits.sum().backward()
    assert all(p.grad.shape == p.shape for p in ours.parameters())


def test_bad_calls():
    _, ours = pair("v1")
    with pytest.raises(AssertionError, match="image is 40x32, the model takes"):
        ours(torch.randn(1, 3, 40, 32))
    with pytest.raises(ValueError, match="stage indices must be in"):
        ours.forward_intermediates(images(), indices=4)
    with pytest.raises(ValueError, match="stage indices must be in"):
        FeaturePyramid(ours, (0, 3))
    with pytest.raises(ValueError, match="output_fmt must be NCHW or NHWC"):
        ours.forward_intermediates(images(), output_fmt="NLC")
    with pytest.raises(ValueError, match="reset_classifier: global_pool must be one of"):
        ours.reset_classifier(3, "token")
    with pytest.raises(ValueError, match="reset_classifier: num_classes must be an integer of at"):
        ours.reset_classifier(-1)
