"""What `vitkernels train` can be told: defaults, arguments, and what of it a run keeps on disk."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import math
from pathlib import Path

from ..arguments import channels, fraction, natural, positive
from ..usage import UsageError

FILE = "options.json"  # in the folder of a run
# Arguments of models that have options of their own.
SAID_APART = {
    "num_classes": "the class folders tell it",
    "drop_path_rate": "use --drop-path",
    "mean": "use --mean",
    "std": "use --std",
}
# What may be said anew beside --resume: it changes no number on a CPU.
OF_THE_MACHINE = ("workers", "threads", "device", "compile", "parallel")
DIGITS_MODEL = "vit_tiny_patch2_8"
# What is usual for them, where nothing else was asked.
DIGITS_RECIPE = {"epochs": 40, "batch": 32, "lr": 3e-3, "warmup_epochs": 3.0, "ema": 0.99}
DIGITS_SIZES = {
    "embed_dim": 64, "depth": 4, "num_heads": 4, "class_token": False, "global_pool": "avg",
    "weight_init": "reset",
}  # fmt: skip


@dataclasses.dataclass
class Options:
    """Every argument with its default; None where another part of the program decides."""

    data: str | None = None
    out: str | None = None
    val_data: str | None = None
    val_fraction: float = 0.1
    model: str | None = None
    model_kwargs: dict = dataclasses.field(default_factory=dict)
    weights: str | None = None
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    skip_bad: bool = False
    workers: int = 2

    epochs: int = 30
    batch: int = 64
    accumulate: int = 1
    lr: float = 1e-3
    min_lr: float = 1e-5
    warmup_epochs: float = 3.0
    weight_decay: float = 0.05
    layer_decay: float | None = None
    clip_grad: float | None = 1.0
    drop_path: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    erase: float = 0.0
    min_crop: float = 0.35
    flip: float = 0.5
    ema: float | None = None
    seed: int = 0

    amp: str = "none"
    grad_checkpointing: bool = False
    compile: bool = False
    device: str = "auto"
    threads: int | None = None
    parallel: str = "ddp"

    teacher: str | None = None
    teacher_epochs: int = 20
    distill: str = "soft"
    alpha: float = 0.5
    temperature: float = 1.0
    compare_seeds: int | None = None

    processes: int = 1  # with which the run began, each with `batch` images: no argument

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @staticmethod
    def load(folder: Path) -> Options:
        path = folder / FILE
        try:
            found = json.loads(path.read_text())
            options = Options(**found)
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(f"--resume: {folder} holds no run: it has no {FILE}") from None
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"--resume: {path} cannot be understood: {error}") from error
        for name in ("mean", "std"):
            value = getattr(options, name)
            setattr(options, name, None if value is None else tuple(value))
        return options


def read(given: argparse.Namespace) -> Options:
    """The options of a new run, or those of the one that --resume names."""
    told = {f.name: getattr(given, f.name) for f in dataclasses.fields(Options) if f.name in given}
    if "model_kwargs" in told:
        told["model_kwargs"] = dict(told["model_kwargs"])
    if getattr(given, "resume", None) is None:
        usual = DIGITS_RECIPE if told.get("data") == "digits" else {}
        options = Options(**{**usual, **told})
        if "warmup_epochs" not in told:
            options.warmup_epochs = min(options.warmup_epochs, options.epochs / 4)
        if "min_lr" not in told:
            options.min_lr = min(options.min_lr, options.lr / 100)
        _check(options)
        return options
    fixed = [name for name in told if name not in OF_THE_MACHINE]
    if fixed:
        raise UsageError(
            f"--resume goes on with the options that {given.resume / FILE} holds: leave out "
            f"{', '.join('--' + name.replace('_', '-') for name in fixed)}"
        )
    options = dataclasses.replace(Options.load(given.resume), **told)
    return dataclasses.replace(options, out=str(given.resume))


def _check(o: Options) -> None:
    if o.data is None or o.out is None:
        raise UsageError("train needs --data DIR|digits and --out DIR (or --resume DIR)")
    if o.data == "digits":
        for name in ("val_data", "weights"):
            if getattr(o, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')}: --data digits has none")
    if o.teacher is None and o.compare_seeds is not None:
        raise UsageError("--compare-seeds compares with and without a teacher: name --teacher")
    if o.warmup_epochs >= o.epochs:
        raise UsageError(
            f"--warmup-epochs: must be less than --epochs {o.epochs}, got {o.warmup_epochs:g}"
        )
    if o.min_lr > o.lr:
        raise UsageError(f"--min-lr: must be at most --lr {o.lr:g}, got {o.min_lr:g}")
    for key in SAID_APART.keys() & o.model_kwargs.keys():
        raise UsageError(f"--model-kwargs: {key} is not for it: {SAID_APART[key]}")
    if "img_size" in o.model_kwargs and o.image_size is not None:
        raise UsageError(
            "--model-kwargs: img_size is what --image-size says: leave one of them out"
        )
    if o.val_data is not None and Path(o.val_data).resolve() == Path(o.data).resolve():
        raise UsageError("--val-data: is the folder of --data, whose images are trained on")


# --- the arguments --------------------------------------------------------------------------------


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments without defaults, so that a resumed run can tell what was said."""
    _add_data(parser.add_argument_group("data"))
    _add_recipe(parser.add_argument_group("recipe"))
    _add_machine(parser.add_argument_group("machine"))
    _add_distillation(parser.add_argument_group("distillation"))


def _add_data(group) -> None:
    group.add_argument(
        "--data", metavar="DIR", help="folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or with "
        "CLASS/*.jpg alone; or `digits`, scikit-learn's 1,797 handwritten ones",
    )  # fmt: skip
    group.add_argument("--out", metavar="DIR", help="new folder for all that the run leaves")
    group.add_argument("--val-data", metavar="DIR", help="CLASS/*.jpg of the held-out images")
    group.add_argument(
        "--val-fraction", type=_between(0, 1), metavar="F",
        help="of each class, held out where there is no val folder (default: 0.1)",
    )  # fmt: skip
    group.add_argument(
        "--skip-bad", action="store_true", help="count and leave out images that cannot be read"
    )
    group.add_argument(
        "--model", metavar="NAME", help="timm's name (default: vit_small_patch16_224; for digits "
        "a small ViT)",
    )  # fmt: skip
    group.add_argument(
        "--model-kwargs", nargs="+", type=_keyword, metavar="KEY=VALUE",
        help="constructor arguments of the model: embed_dim=64 depth=4",
    )  # fmt: skip
    group.add_argument("--weights", metavar="FILE", help="checkpoint to start from (fine-tuning)")
    group.add_argument("--image-size", type=positive, metavar="N")
    group.add_argument("--mean", type=channels, metavar="M[,M,M]", help="of pixels in [0, 1]")
    group.add_argument("--std", type=channels, metavar="S[,S,S]")
    group.add_argument(
        "--workers", type=natural, metavar="N", help="processes that decode images (default: 2)"
    )


def _add_recipe(group) -> None:
    group.add_argument("--epochs", type=positive, metavar="N", help="default: 30")
    group.add_argument("--batch", type=positive, metavar="N", help="of a process (default: 64)")
    group.add_argument(
        "--accumulate", type=positive, metavar="N", help="batches of one step (default: 1)"
    )
    group.add_argument(
        "--lr", type=_above_zero, metavar="X", help="highest learning rate (default: 0.001)"
    )
    for name, what, default in (
        ("min-lr", "where the cosine ends", "1e-05, at most a hundredth of --lr"),
        ("weight-decay", "of matrices; biases, norms and positions have none", 0.05),
        ("warmup-epochs", "of linear warm-up", "3, at most a quarter of --epochs"),
    ):
        group.add_argument(
            f"--{name}", type=_from_zero, metavar="X", help=f"{what} (default: {default})"
        )
    group.add_argument(
        "--layer-decay", type=fraction, metavar="F",
        help="of the learning rate, layer by layer from the head down (needs timm)",
    )  # fmt: skip
    group.add_argument(
        "--clip-grad", type=_from_zero, metavar="X", help="largest norm, 0: none (default: 1)"
    )
    group.add_argument(
        "--drop-path", type=_below_one, metavar="F",
        help="stochastic depth of the last block (default: 0)",
    )  # fmt: skip
    for name, what in (
        ("label-smoothing", "of the targets"),
        ("mixup", "alpha of mixup (needs timm)"),
        ("cutmix", "alpha of cutmix (needs timm)"),
        ("erase", "share of images with a random rectangle erased (needs timm)"),
    ):
        group.add_argument(
            f"--{name}", type=_between(0, 1), metavar="F", help=f"{what} (default: 0)"
        )
    group.add_argument(
        "--min-crop", type=_between(0, 1), metavar="F",
        help="least share of an image that a random crop keeps (default: 0.35)",
    )  # fmt: skip
    group.add_argument(
        "--flip", type=_between(0, 1), metavar="P", help="of a left-right flip (default: 0.5)"
    )
    group.add_argument(
        "--ema", type=_below_one, metavar="D",
        help="test and keep a moving average of the weights with this decay",
    )  # fmt: skip
    group.add_argument("--seed", type=_seed, metavar="N", help="default: 0")


def _add_machine(group) -> None:
    group.add_argument(
        "--amp", choices=("none", "bf16", "fp16"), help="autocast; fp16 scales the loss"
    )
    group.add_argument(
        "--grad-checkpointing", action="store_true", help="less memory, one more forward"
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the model")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"))
    group.add_argument("--threads", type=positive, metavar="N", help="of a process, on the CPU")
    group.add_argument(
        "--parallel", choices=("ddp", "fsdp", "tp"),
        help="under torchrun: replicas, sharded parameters, or split heads (default: ddp)",
    )  # fmt: skip
    group.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in DIR")


def _add_distillation(group) -> None:
    group.add_argument(
        "--teacher", metavar="FILE", help="checkpoint of any model here, or `cnn`: a small "
        "convolutional network, trained first on the same data",
    )  # fmt: skip
    group.add_argument(
        "--teacher-epochs", type=positive, metavar="N", help="of the cnn (default: 20)"
    )
    group.add_argument(
        "--distill", choices=("soft", "hard"), help="teacher's probabilities or its best class"
    )
    group.add_argument(
        "--alpha", type=_between(0, 1), metavar="F", help="weight of the teacher (default: 0.5)"
    )
    group.add_argument("--temperature", type=_above_zero, metavar="T", help="default: 1")
    group.add_argument(
        "--compare-seeds", type=positive, metavar="K",
        help="train with and without the teacher from K seeds and report the difference",
    )  # fmt: skip


# --- values ---------------------------------------------------------------------------------------


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    return value if math.isfinite(value) else math.nan


def _between(low: float, high: float):
    def parse(text: str) -> float:
        value = _number(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, got {text!r}")
        return value

    return parse


def _below_one(text: str) -> float:
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to below 1, got {text!r}")
    return value


def _seed(text: str) -> int:
    value = natural(text)
    if value >= 2**32:
        raise argparse.ArgumentTypeError(f"must be below 2**32, got {text!r}")
    return value


def _from_zero(text: str) -> float:
    value = _number(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be a number from 0 on, got {text!r}")
    return value


def _above_zero(text: str) -> float:
    value = _number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def _keyword(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not (equals and key.isidentifier()):
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
