"""FusedSwin gives timm's numbers: logits and every gradient, in evaluation and in training mode."""

import copy
import statistics

import pytest
import torch
from model_checks import (
    BF16,
    check_autocast_dtypes,
    check_bf16,
    check_draws,
    check_float64,
    check_fp32,
    check_loss_curve,
)
from swin_pairs import (
    CONFIGS,
    FAST,
    ROUNDING,
    classes,
    images,
    logits_and_grads,
    needs_timm,
    pair,
    randomised,
    relative_errors,
    settings,
    timm,
)

from vitkernels import FusedSwin, use_backend
from vitkernels.models.swin_names import swin_settings
from vitkernels.testing import cases

pytestmark = pytest.mark.skipif(**needs_timm)


@pytest.mark.parametrize("name", CONFIGS)
def test_errors_are_those_of_timm(name):
    """The reference in float64 equals timm; each backend in fp32 errs at most twice as timm."""
    theirs, ours = pair(name)
    x = images(name)
    check_float64(theirs, ours, x)
    cases.record("FusedSwin", "reference", torch.float64, name)

    def least(key, truth):
        """One number's rounding scatters; the table network's gradients are sums of a few."""
        return ROUNDING if truth.numel() < 8 or "cpb_mlp" in key else 1e-6

    for backend in ("auto", "torch"):
        check_fp32(theirs, ours, x, backend, least)
        cases.record("FusedSwin", backend, torch.float32, name)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_errors_of_the_table_network_are_those_of_timm(backend):
    """Each number scatters; the geometric mean over parameters and nine draws does not."""
    ratios = []
    for seed in range(9):
        torch.manual_seed(seed)
        theirs, ours = pair("v2")
        x = images("v2")
        truth = logits_and_grads(copy.deepcopy(theirs).double(), x.double())
        with use_backend(backend):
            errors = relative_errors(logits_and_grads(ours, x), truth)
        base = relative_errors(logits_and_grads(theirs, x), truth)
        ratios += [errors[key] / base[key] for key in truth if "cpb_mlp" in key]
    assert len(ratios) == 9 * 18
    assert statistics.geometric_mean(ratios) <= 1.5


def test_swin_tiny_itself():
    theirs = randomised(timm.create_model("swin_tiny_patch4_window7_224").eval())
    ours = FusedSwin(**swin_settings("swin_tiny_patch4_window7_224")).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        base, got = theirs(x), ours(x)
        truth = theirs.double()(x.double())
    error, limit = ((y - truth).norm() / truth.norm() for y in (got, base))
    assert error <= max(2 * limit.item(), 1e-6)
    cases.record("FusedSwin", "auto", torch.float32, "swin_tiny")


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("how", BF16)
def test_bf16_error_is_that_of_timm(name, how):
    check_bf16(*pair(name), images(name, batch=4), how, fewest=8)
    cases.record("FusedSwin", "auto", torch.bfloat16, name, how)


RANDOM = {
    "drop_path": {"drop_path_rate": 0.4},
    "drop_path_everywhere": {"drop_path_rate": 0.9},
    "dropouts": {"drop_rate": 0.2, "proj_drop_rate": 0.3},
}


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("config", ["v1", "v2", "v1_odd_maps"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_mode_draws_as_timm_does(config, name, checkpointing):
    models = [model.train() for model in pair(config, **RANDOM[name])]
    for model in models:
        for stage in model.layers:
            for block in stage.blocks:  # drawn in the order of windows by timm, of the map by us
                block.attn.proj_drop.p = 0.0
        model.set_grad_checkpointing(checkpointing)
    check_draws(*models, images(config, batch=6))


@pytest.mark.parametrize("config", ["v1", "v2"])
@pytest.mark.parametrize("dropout", ["attn_drop_rate", "proj_drop_rate"])
def test_dropout_inside_the_attention(config, dropout):
    """Its mean over many draws is the output without it; a seed repeats it."""
    theirs, ours = pair(config, depths=(1,), num_heads=(1,), num_classes=0, **{dropout: 0.3})
    attn = ours.layers[0].blocks[0].attn.train()
    x = torch.randn(1, 16, 16, 32)
    with torch.no_grad():
        torch.manual_seed(1)
        draws = torch.stack([attn(x) for _ in range(300)])
        torch.manual_seed(1)
        assert torch.equal(attn(x), draws[0])
        expected = attn.eval()(x)
    error = (draws.mean(0) - expected).norm() / (draws[0] - expected).norm()
    assert error < 1.5 / 300**0.5


@pytest.mark.parametrize("scheme", ["", "jax", "jax_nlhb", "moco", "reset"])
@pytest.mark.parametrize("version", [1, 2])
def test_initial_weights_are_those_of_timm(version, scheme):
    if version == 2 and scheme:  # timm's has one scheme
        with pytest.raises(ValueError, match="weight_init must be '' or 'skip' with version=2"):
            FusedSwin(**settings("v2", weight_init=scheme))
        return
    arguments = settings(f"v{version}", num_classes=7)
    scheme = {"weight_init": scheme} if version == 1 else {}
    models = []
    for cls in (classes()[version], FusedSwin):
        torch.manual_seed(5)
        own = {k: v for k, v in arguments.items() if cls is FusedSwin or k != "version"}
        model = cls(**own, **scheme)
        made = copy.deepcopy(model.state_dict())
        torch.manual_seed(6)
        model.init_weights()
        models.append((made, model.state_dict()))
    for got, expected in zip(models[1], models[0], strict=True):
        assert list(got) == list(expected)
        assert not [key for key in got if not torch.equal(got[key], expected[key])]


@pytest.mark.parametrize("config", ["v1", "v2"])
def test_twenty_training_steps_follow_the_same_loss_curve(config):
    check_loss_curve(*pair(config, drop_path_rate=0.1), images(config, batch=8), 20)


@pytest.mark.parametrize("config", ["v1", "v2"])
def test_autocast_dtypes_are_those_of_timm(config):
    check_autocast_dtypes(*pair(config), images(config))


NAMES = (
    []
    if timm is None
    else timm.list_models("swin_*") + timm.list_models("swinv2_*", exclude_filters="*_cr_*")
)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_timm_loads_strictly(name):
    theirs = timm.create_model(name, device="meta")
    ours = FusedSwin(
        **swin_settings(name), num_classes=theirs.num_classes, device="meta", weight_init="skip"
    )
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    ours.load_state_dict(state, strict=True, assign=True)
    for stage, their_stage in zip(ours.layers, theirs.layers, strict=True):
        for block, their_block in zip(stage.blocks, their_stage.blocks, strict=True):
            for attribute in ("window_size", "shift_size", "input_resolution"):
                assert getattr(block, attribute) == getattr(their_block, attribute)
            assert block.attn.window_size == their_block.attn.window_size
            assert block.drop_path1.drop_prob == getattr(their_block.drop_path1, "drop_prob", 0.0)
    assert ours.feature_info == theirs.feature_info
    assert ours.num_features == theirs.num_features
