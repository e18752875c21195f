"""From a timm name to a model of ours, with fresh weights or with those of a file."""

from __future__ import annotations

import difflib
import re
import warnings
from pathlib import Path

from torch import nn

from .families import FAMILIES, Family, family_of, family_of_weights, plain_family
from .timm_peer import import_timm
from .usage import UsageError, check_input_file, one_line

COMMON = [name for family in FAMILIES for name in family.common]


def check_name(name: str) -> None:
    """Refuse what is neither of our own names nor one of timm's, with the nearest ones."""
    if plain_family(name) is not None:
        return
    timm = import_timm()
    if timm is not None and timm.is_model(name):
        return
    known = COMMON if timm is None else [*dict.fromkeys([*COMMON, *timm.list_models()])]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.55)
    hint = f"did you mean {' or '.join(near)}?" if near else f"one of them is {COMMON[0]}"
    more = "" if timm else " (timm, which knows more names, is not installed: pip install timm)"
    raise UsageError(f"--model: unknown model {name!r}: {hint}{more}")


def make_model(name: str, **settings) -> nn.Module:
    """With random weights; settings are those that timm.create_model takes too."""
    check_name(name)
    family = plain_family(name)
    if family is not None:
        return _named(family, name, **settings).eval()
    return from_timm_model(name, make_timm_model(name, **settings))


def from_timm_model(name: str, model: nn.Module) -> nn.Module:
    """Ours of timm's; one line names what our models do not have."""
    try:
        return family_of(model).model.from_timm(model).eval()
    except ValueError as error:
        raise UsageError(f"--model {name}: {one_line(error)}") from error


def make_timm_model(name: str, **settings) -> nn.Module:
    """timm's own model of a name that check_name let pass."""
    try:
        model = import_timm().create_model(name, pretrained=False, **settings).eval()
    except Exception as error:  # timm asserts, and raises what its layers raise
        raise UsageError(f"--model {name}: timm refuses it: {one_line(error)}") from error
    return _with_patches(model)


def _named(family: Family, name: str, **settings) -> nn.Module:
    try:
        return family.model.named(name, **settings)
    except ValueError as error:
        raise UsageError(f"{_argument(error, f'--model {name}')}: {one_line(error)}") from error


def _with_patches(model: nn.Module) -> nn.Module:
    embed = getattr(model, "patch_embed", None)
    if 0 in (getattr(embed, "grid_size", None) or ()):
        (H, W), (ph, pw) = embed.img_size, embed.patch_size
        raise UsageError(f"--image-size: {H}x{W} pixels are less than one patch of {ph}x{pw}")
    return model


def load_model(name: str | None, path: Path, **settings) -> nn.Module:
    """A model with the weights of a file or folder, which say how many classes there are.

    name: the architecture to expect, and what shapes do not tell (heads, activation); None takes
    what the weights look like.
    """
    if not path.is_dir():
        check_input_file(path, "--weights")
    if name is None:
        return _pretrained(family_of_weights(path), path, **settings)
    like = _skeleton(name, **settings)
    family = family_of(like)
    size = {"img_size": like.patch_embed.img_size}
    try:
        loaded = _pretrained(family, path, **family.unwritten(like), **size)
    except UsageError:  # so many heads do not fit this width: then say which width it is
        loaded = _pretrained(family, path, **size)
    facts = zip(family.shape(loaded), family.shape(like), strict=True)
    differences = [
        f"{what} is {found} where {expected} is expected"
        for (what, found), (_, expected) in facts
        if found != expected
    ]
    if differences:
        raise UsageError(
            f"--weights: {path} is not of --model {name} ({', '.join(differences)}): name its own "
            "model, or leave --model out"
        )
    if plain_family(name) is not None:
        return loaded
    settings |= {"num_classes": loaded.num_classes, "img_size": loaded.patch_embed.img_size}
    model = make_model(name, in_chans=loaded.in_chans, **settings)
    try:
        model.load_state_dict(loaded.to_timm_state_dict(), strict=True)
    except RuntimeError as error:
        raise UsageError(f"--weights: {path} is not of --model {name}: {one_line(error)}") from None
    return model


def _pretrained(family: Family, path: Path, **settings) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch.load, about old files
            return family.model.from_pretrained(path, **settings).eval()
    except RuntimeError as error:  # of the resampling
        raise UsageError(
            f"--image-size: the positions of {path} cannot be resampled to it "
            f"({one_line(error)}): name a multiple of the patch size"
        ) from None
    except (ValueError, ImportError, OSError) as error:
        told = one_line(error).removeprefix("from_pretrained: ")
        told = re.sub(
            r", which Fused\w+ does not load: use Fused\w+\.from_pretrained$",
            ": name its own --model, or leave --model out",
            told,
        )
        raise UsageError(f"{_argument(error, '--weights')}: {told}") from None


def _argument(error: Exception, otherwise: str) -> str:
    """Which argument a refusal of ours is about."""
    return "--image-size" if "img_size must be at least" in str(error) else otherwise


def _skeleton(name: str, **settings) -> nn.Module:
    """Of this name, to be compared with, not run."""
    check_name(name)
    family = plain_family(name)
    if family is not None:
        return _named(family, name, **settings | {"weight_init": "skip", "device": "meta"})
    return make_model(name, **settings)
