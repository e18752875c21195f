"""The parts of `vitkernels train` against their formulas and against timm's and torch's own."""

import argparse
import dataclasses
import math

import numpy as np
import pytest
import torch
from timm_stub import timm
from torch import nn

from vitkernels import FusedSwin, FusedViT
from vitkernels.cli import train
from vitkernels.cli.train import options, recipe, study
from vitkernels.cli.train.data import Bad, InOrder, Shuffled, loader, open_digits, random_box
from vitkernels.cli.train.heads import packed, packed_order, unpacked
from vitkernels.cli.train.options import Options
from vitkernels.cli.train.parallel import World, clip_gradients
from vitkernels.cli.usage import UsageError

needs_timm = pytest.mark.skipif(timm is None, reason="timm is not installed")
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}
SWIN = {
    "img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2),
    "window_size": 4,
}  # fmt: skip


def test_the_learning_rate_of_every_step():
    o = Options(epochs=4, warmup_epochs=1.0, lr=0.1, min_lr=0.001)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=o.lr)
    schedule = recipe.make_schedule(optimizer, o, steps_per_epoch=5)
    found = []
    for _ in range(20):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    warm = [0.1 * (i + 1) / 5 for i in range(5)]
    cosine = [0.001 + 0.099 * 0.5 * (1 + math.cos(math.pi * i / 15)) for i in range(15)]
    assert found == pytest.approx(warm + cosine, rel=1e-12)
    assert schedule.get_last_lr()[0] == pytest.approx(0.001)


@needs_timm
@pytest.mark.parametrize("make", [lambda: FusedViT(**VIT), lambda: FusedSwin(**SWIN)])
def test_groups_are_timms(make):
    from timm.optim import param_groups_weight_decay

    model = make()
    ours = recipe._groups(model, Options(weight_decay=0.05))
    exempt = model.no_weight_decay()
    theirs = param_groups_weight_decay(model, 0.05, no_weight_decay_list=exempt)

    def decays(groups):
        return {p: g["weight_decay"] for g in groups for p in g["params"]}

    assert decays(ours) == decays(theirs)


@needs_timm
def test_layer_decay_scales_learning_rates():
    model = FusedViT(**VIT)
    o = Options(lr=1.0, layer_decay=0.5, weight_decay=0.05)
    optimizer = recipe.make_optimizer(model, o)
    rates = {p: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    blocks = [rates[block.mlp.fc1.weight] for block in model.blocks]
    assert rates[model.head.weight] == 1.0
    assert blocks[1] == pytest.approx(2 * blocks[0]) and blocks[2] == pytest.approx(2 * blocks[1])
    assert rates[model.patch_embed.proj.weight] == pytest.approx(blocks[0] / 2)


def test_average_is_its_formula():
    model = nn.Linear(3, 2)
    average = recipe.Average(model, 0.9)
    expected = model.weight.detach().double().clone()
    for step in range(1, 6):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
        average.update()
    mine = model.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(model.weight.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(model.weight, mine)


@needs_timm
def test_mixing_normalises_and_mixes():
    o = Options(mixup=1.0, label_smoothing=0.1)
    mean, std = torch.tensor([0.2, 0.4, 0.5]), torch.tensor([0.1, 0.3, 0.2])
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    np.random.seed(0)
    mixed, targets = recipe.Mixing(o, 4, mean, std)(images, torch.tensor([0, 1, 2, 3, 1]))
    assert mixed.shape[0] == 6 and torch.allclose(targets.sum(1), torch.ones(6))
    images = torch.cat((images, images[2:3]))  # a pair for the odd one
    x = (images.double() / 255 - mean[:, None, None]) / std[:, None, None]
    share = ((mixed[0].double() - x[5]) / (x[0] - x[5])).nanmedian()  # image 0 with the last
    torch.testing.assert_close(
        mixed.double(), share * x + (1 - share) * x.flip(0), rtol=1e-5, atol=1e-5
    )
    assert targets[0, 0].item() == pytest.approx(0.9 * share.item() + 0.025, abs=1e-5)
    plain = recipe.Mixing(Options(), 4, mean, std)
    assert not plain


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 3])
def test_an_epoch_is_every_image_once(world):
    parts = [Shuffled(100, 8, seed=5, rank=r, world=world) for r in range(world)]
    seen = []
    for part in parts:
        part.epoch = 2
        seen += [i for batch in part for _, i in batch]
        assert len(list(part)) == len(part) == 100 // (8 * world)
    assert len(seen) == len(set(seen)) == len(parts[0]) * 8 * world
    other = Shuffled(100, 8, seed=5, rank=0, world=world)
    assert list(other) != list(parts[0])  # epoch 0 is another order
    other.epoch, other.first = 2, 2
    assert list(other) == list(parts[0])[2:]


@pytest.mark.parametrize(
    ("length", "batch", "world"), [(10, 4, 1), (10, 4, 2), (9, 2, 4), (1, 8, 3)]
)
def test_a_test_sees_every_image_once_in_as_many_batches(length, batch, world):
    parts = [list(InOrder(length, batch, rank, world)) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    seen = [i for part in parts for rows in part for _, i in rows if i >= 0]
    assert sorted(seen) == list(range(length))


def test_what_fills_a_test_batch_is_readable():
    good = (torch.zeros(1, 2, 2, dtype=torch.uint8), 3)
    for base, targets, bad in (([Bad("broken"), good], [-1], 0), ([Bad("broken")], [], 1)):
        feed = loader(Rows(base), InOrder(1, 4, rank=1, world=2), 0, False)
        (batch,) = feed
        assert batch.targets.tolist() == targets and len(batch.bad) == bad


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        return self.rows[key[1]]


def test_digits_are_the_same_for_any_epoch_order():
    data = open_digits(seed=3)
    assert len(data.train) + len(data.held_out) == 1797
    one, two = data.train[(4, 17)][0], data.train[(4, 17)][0]
    assert torch.equal(one, two)
    assert any(not torch.equal(data.train[(e, 17)][0], one) for e in range(5, 12))
    assert torch.equal(data.train[(None, 17)][0][0], torch.from_numpy(data.train.images[17]))
    before = torch.get_rng_state()
    next(iter(loader(data.train, Shuffled(len(data.train), 8, 0), 0, pinned=False)))
    assert torch.equal(torch.get_rng_state(), before)


def test_boxes_lie_inside_and_keep_their_share():
    rng = np.random.default_rng(0)
    shares, shapes = [], []
    for _ in range(2000):
        left, top, right, bottom = random_box((640, 427), 0.35, rng)
        assert 0 <= left < right <= 640 and 0 <= top < bottom <= 427
        shares.append((right - left) * (bottom - top) / (640 * 427))
        shapes.append((right - left) / (bottom - top))
    assert min(shares) > 0.34 and max(shares) <= 1.0 and max(shares) - min(shares) > 0.5
    assert min(shapes) > 0.74 and max(shapes) < 1.35


def test_a_box_of_a_sliver_is_its_middle():
    assert random_box((1000, 3), 0.9, np.random.default_rng(0)) == (498.5, 0.0, 501.5, 3.0)


# --- gradients, packed rows, options --------------------------------------------------------------


@pytest.mark.parametrize("most", [1e-3, 1e3])
def test_clipping_is_torchs(most):
    torch.manual_seed(0)
    models = [nn.Linear(7, 5), nn.Linear(7, 5)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model(torch.ones(3, 7)).square().sum().backward()
    ours = clip_gradients(models[0].parameters(), most)
    theirs = nn.utils.clip_grad_norm_(models[1].parameters(), most)
    torch.testing.assert_close(ours, theirs)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_packed_rows_give_each_process_its_heads():
    heads, dim, size = 4, 3, 2
    rows = torch.arange(3 * heads * dim)
    mine = rows[packed_order(heads, dim, size)].view(size, 3, heads // size, dim)
    full = rows.view(3, heads, dim)
    for rank in range(size):
        assert torch.equal(mine[rank], full[:, rank * 2 : rank * 2 + 2])
    name, value = "blocks.0.attn.qkv.weight", torch.randn(3 * heads * dim, 5)
    assert torch.equal(unpacked(name, packed(name, value, heads, size), heads, size), value)
    assert unpacked("blocks.0.mlp.fc1.weight", value, heads, size) is value


def test_every_option_has_an_argument_and_a_default():
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    options.configure(parser)
    known = {action.dest for action in parser._actions} - {"help", "resume"}
    assert known == {field.name for field in dataclasses.fields(Options)} - {"processes"}
    assert vars(parser.parse_args([])) == {}


def test_options_survive_the_disk(tmp_path):
    o = Options(data="digits", out=str(tmp_path), mean=(0.1, 0.2), model_kwargs={"depths": [1, 2]})
    o.save(tmp_path)
    assert Options.load(tmp_path) == o
    (tmp_path / options.FILE).write_text("{")
    with pytest.raises(UsageError, match="cannot be understood"):
        Options.load(tmp_path)


def test_a_step_keeps_its_images_when_the_number_of_processes_changes():
    began = train._began(Options(batch=12, parallel="fsdp"), World(0, 2))
    for parallel, size, batch in (("ddp", 1, 24), ("ddp", 4, 6), ("fsdp", 3, 8), ("tp", 4, 24)):
        o = dataclasses.replace(began, parallel=parallel)
        assert train._shared(o, World(0, size)).batch == batch
    with pytest.raises(UsageError, match="5 processes cannot share the 24 images of a step"):
        train._shared(began, World(0, 5))
    with pytest.raises(UsageError, match="--compare-seeds takes one process"):
        train._began(Options(compare_seeds=2), World(0, 2))


def test_the_study_says_what_it_found():
    def report(*pairs):
        runs = [
            {"seed": i, "alone": a, "taught": t, "difference": t - a}
            for i, (a, t) in enumerate(pairs)
        ]
        return study.summary(runs)

    good = report((0.90, 0.92), (0.91, 0.92))
    assert good["holds"] and good["better"] == 2
    assert good["mean_difference"] == pytest.approx(0.015)
    assert "+1.50 points" in study.sentence(good) and "margin holds" in study.sentence(good)
    bad = report((0.90, 0.92), (0.93, 0.92))
    assert not bad["holds"] and bad["better"] == 1
    assert "does not hold" in study.sentence(bad)
