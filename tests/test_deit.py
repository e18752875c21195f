"""FusedDeiT gives timm's numbers, trains with two heads, and does what training scripts ask."""

import pytest
import torch
from deit_pairs import CONFIGS, DISTILLED, PLAIN, Joined, images, pair, timm_deit
from model_checks import (
    check_bf16,
    check_checkpointing,
    check_draws,
    check_dynamic_batch,
    check_export,
    check_float64,
    check_fp32,
    check_intermediates,
    check_one_graph,
    check_source_left_alone,
)
from timm_stub import timm
from vit_pairs import logits_and_grads, needs_timm, randomised, same

from vitkernels import FusedDeiT, FusedViT
from vitkernels import nn as vnn
from vitkernels.models.deit_names import DEIT_NAMES
from vitkernels.nn import Attention
from vitkernels.testing import cases

pytestmark = pytest.mark.skipif(**needs_timm)


def trained(models, enable):
    """In distilled training, where both heads' logits come out."""
    for model in models:
        if enable:
            model.train()
            model.set_distilled_training(True)
    return [Joined(model) for model in models]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "distilled training"])
@pytest.mark.parametrize("name", CONFIGS)
def test_parity_with_timm(name, training):
    if training and name in PLAIN:
        pytest.skip("one head")
    theirs, ours = trained(pair(name), training)
    x = images(name)
    assert ours(x).shape == ((2, 2, 10) if training else (2, 10))
    check_float64(theirs, ours, x)
    check_fp32(theirs, ours, x, "auto")
    cases.record("FusedDeiT", "reference", torch.float64, name, str(training))
    cases.record("FusedDeiT", "auto", torch.float32, name, str(training))


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_bf16_error_is_that_of_timm(how):
    check_bf16(*pair(), images(batch=4), how)


@pytest.mark.parametrize("name", DEIT_NAMES)
def test_every_name_of_timm(name):
    """The same parameters under the same names, and the same numbers; two blocks of each."""
    options = {"depth": 2, "img_size": 2 * (14 if "14" in name else 16), "num_classes": 3}
    theirs = randomised(timm.create_model(name, **options).eval())
    ours = FusedDeiT.named(name, **options).eval()
    assert ours.distilled == ("distilled" in name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(1, 3, options["img_size"], options["img_size"])
    same({"y": ours(x)}, {"y": theirs(x)})
    assert ours.patch_embed.mean.tolist() == pytest.approx(theirs.pretrained_cfg["mean"])
    assert FusedDeiT.named(name, device="meta").patch_embed.img_size[0] == int(name[-3:])


OTHER_NAMES = (
    "deit_tiny", "deit_tiny_patch16_224x", "vit_tiny_patch16_224", "deit_vast_patch16_224",
    "deit3_small_distilled_patch16_224",
)  # fmt: skip


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=r"FusedDeiT\.named: name must be deit_SIZE_patch.* got"):
        FusedDeiT.named(name)


def test_training_mode_draws_as_timm_does():
    models = pair(drop_path_rate=0.4, drop_rate=0.2, proj_drop_rate=0.1)
    check_draws(*trained(models, True), images(batch=6))


@pytest.mark.parametrize("scheme", ["", "jax", "reset"])
def test_initial_weights_are_those_of_timm(scheme):
    from timm.models.deit import VisionTransformerDistilled

    options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    models = []
    for cls in (VisionTransformerDistilled, FusedDeiT):
        torch.manual_seed(5)
        model = cls(num_classes=7, weight_init=scheme, **options)
        if scheme == "reset":
            model.init_weights()
        models.append(model.state_dict())
    assert list(models[0]) == list(models[1])
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


# ---- Two heads


def test_the_pair_only_in_distilled_training():
    theirs, ours = pair()
    x = images()
    for training in (False, True):
        for enable in (False, True):
            for model in (theirs, ours):
                model.train(training)
                model.set_distilled_training(enable)
            got, expected = ours(x), theirs(x)
            assert isinstance(got, tuple) == isinstance(expected, tuple) == (training and enable)
            if isinstance(got, tuple):
                same({"y": (got[0] + got[1]) / 2}, {"y": ours.eval()(x)})
    features = ours.forward_features(x)
    same({"y": ours.forward_head(features, pre_logits=True)},
         {"y": theirs.forward_head(theirs.forward_features(x), pre_logits=True)})  # fmt: skip


def test_a_training_step_with_the_loss():
    """Teacher, student and loss together: every parameter learns, and the loss goes down."""
    torch.manual_seed(2)
    student = FusedDeiT(32, 8, embed_dim=48, depth=2, num_heads=3, num_classes=5).train()
    student.set_distilled_training()
    criterion = vnn.DistillationLoss(alpha=0.5, temperature=2.0, label_smoothing=0.1)
    x, targets, teacher = images(batch=8), torch.randint(0, 5, (8,)), 3 * torch.randn(8, 5)
    optimizer, losses = torch.optim.AdamW(student.parameters(), lr=2e-3), []
    for _ in range(40):
        loss = criterion(student(x), targets, teacher)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is not None and p.grad.any() for p in student.parameters())
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_the_last_block_computes_what_the_heads_read(monkeypatch):
    seen, first_rows = [], Attention._first_rows

    def watched(self, x, rows):
        seen.append(rows)
        return first_rows(self, x, rows)

    monkeypatch.setattr(Attention, "_first_rows", watched)
    for name, rows in (("distilled", 2), ("deit", 1)):
        _, ours = pair(name)
        got = logits_and_grads(ours, images(name, 3) * 0 + 0.3)
        assert seen == [rows]
        ours.blocks[0].register_forward_hook(lambda *_: None)
        same(got, logits_and_grads(ours, images(name, 3) * 0 + 0.3))
        assert seen == [rows]
        seen.clear()


def test_a_subclass_with_another_head_sees_all_tokens():
    class Mean(FusedDeiT):
        def forward_head(self, x, pre_logits=False):
            assert x.shape[1] == 18
            return self.head(x.mean(1))

    model = Mean(32, 8, embed_dim=48, depth=2, num_heads=3, num_classes=5).eval()
    assert model(images()).shape == (2, 5)


def test_images_to_tokens_in_one_call(monkeypatch):
    """Two tokens before the patches; uint8 images are normalised inside, with ImageNet's values."""
    _, ours = pair()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406),
                                                         (0.229, 0.224, 0.225)))  # fmt: skip
    floats = (pixels / 255 - mean) / std
    monkeypatch.setattr(FusedDeiT, "_pos_embed", None)  # not called
    monkeypatch.setattr(FusedViT, "_pos_embed", None)
    same({"y": ours(pixels)}, {"y": ours(floats)}, 2e-5)
    monkeypatch.undo()
    expected = ours(floats)
    ours.patch_embed.register_forward_hook(lambda *_: None)  # apart: projection, then positions
    same({"y": ours(floats)}, {"y": expected})


# ---- What training scripts ask


@pytest.mark.parametrize("name", ["distilled", "deit3"])
def test_gradient_checkpointing_changes_nothing(name):
    _, ours = pair(name, drop_path_rate=0.4)
    check_checkpointing(ours, torch.ones(3, 3, 32, 32) * 0.4)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_as_one_graph(training):
    _, ours = pair(depth=2)
    (joined,) = trained([ours], training)
    check_one_graph(joined, images(batch=3), "train" if training else "eval")


def test_dynamic_batch_compiles_once():
    check_dynamic_batch(pair(depth=2)[1], (images(batch=batch) for batch in (2, 3, 5)))


def test_torch_export():
    check_export(pair()[1], images())


INTERMEDIATES = (
    {},
    {"indices": 2, "norm": True, "output_fmt": "NLC"},
    {"indices": [0, 2], "return_prefix_tokens": True},
)


@pytest.mark.parametrize("options", INTERMEDIATES, ids=str)
def test_forward_intermediates(options):
    check_intermediates(*pair("dynamic_size"), images("dynamic_size"), options)


def test_methods_are_those_of_timm():
    theirs, ours = pair()
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    assert ours.group_matcher() == theirs.group_matcher()
    assert [h.out_features for h in ours.get_classifier()] == [10, 10]
    for model in (theirs, ours):
        model.eval()
        model.reset_classifier(4)
    assert ours.head.out_features == ours.head_dist.out_features == ours.num_classes == 4
    assert not ours.head_dist.training and list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = images()
    same({"y": ours(x)}, {"y": theirs(x)})
    for model in (theirs, ours):
        model.reset_classifier(0)
    same({"y": ours(x)}, {"y": theirs(x)})
    with pytest.raises(ValueError, match="reset_classifier: global_pool must be 'token'"):
        ours.reset_classifier(4, "avg")


def test_without_distillation_it_is_a_vit():
    theirs, ours = pair("deit")
    assert ours.get_classifier() is ours.head and ours.head_dist is None
    assert ours.group_matcher() == theirs.group_matcher()
    ours.reset_classifier(3, "avg")
    assert ours(images()).shape == (2, 3)
    with pytest.raises(ValueError, match="set_distilled_training: the model must have a disti"):
        ours.set_distilled_training()
    FusedViT(32, 8, embed_dim=48, depth=3, num_heads=3, num_classes=10).load_state_dict(
        FusedDeiT.from_timm(theirs).state_dict(), strict=True
    )


def test_another_image_size():
    theirs, ours = pair()
    for model in (theirs, ours):
        model.set_input_size(img_size=48)
    x = torch.randn(1, 3, 48, 48)
    same({"y": ours(x)}, {"y": theirs(x)})


def test_a_dropped_patch_is_never_the_distillation_token():
    """timm's patch dropout counts one token before the patches, and may drop this one."""
    model = FusedDeiT(32, 8, embed_dim=48, depth=1, num_heads=3, patch_drop_rate=0.9).train()
    tokens = model._embed(images() * 0)
    assert tokens.shape[1] == 2 + 1
    kept = model.dist_token + model.pos_embed[:, 1:2]
    torch.testing.assert_close(tokens[:, 1:2], kept.expand(2, -1, -1))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"global_pool": "avg"}, "global_pool must be 'token' .* got 'avg'"),
        ({"reg_tokens": 2}, "reg_tokens must be 0 beside a distillation token, got 2"),
        ({"distilled": 1}, "distilled must be True or False, got 1"),
        ({"dist_head": None}, "dist_head must be True or False, got None"),
        ({"global_pool": "map"}, "attention pooling"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, sentence):
    with pytest.raises((TypeError, ValueError), match=f"FusedDeiT: .*{sentence}|{sentence}"):
        FusedDeiT(32, 8, embed_dim=48, depth=1, num_heads=3, **arguments)


@pytest.mark.parametrize("name", DISTILLED)
def test_from_timm_copies_and_keeps_the_mode(name):
    theirs = timm_deit(name).bfloat16().train()
    theirs.set_distilled_training(True)
    theirs.dist_token.requires_grad_(False)
    ours = FusedDeiT.from_timm(theirs)
    assert ours.training and ours.distilled_training and not ours.dist_token.requires_grad
    check_source_left_alone(theirs, ours, torch.bfloat16)
    with pytest.raises(ValueError, match="VisionTransformerDistilled is not supported by FusedVi"):
        FusedViT.from_timm(theirs)
