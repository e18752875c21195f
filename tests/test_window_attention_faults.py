"""The tests of window_attention can fail: each changed line of the reference is caught by check."""

import importlib.util

import pytest
from problems import check
from window_attention_problems import LN_100, window_problem

from vitkernels.ops.window_attention import op, reference

# What is changed: (the text in reference.py, which must be there once, what replaces it).
MUTANTS = {
    "mask lost": ("masked_fill(apart[:, None], -torch.inf), cosine", "clone(), cosine"),
    "mask of another window": (
        "region[:, :, None] != region",
        "region.flip(0)[:, :, None] != region",
    ),
    "mask inverted": (
        "region[:, :, None] != region[:, None, :]",
        "region[:, :, None] == region[:, None, :]",
    ),
    "no seam between rows": (
        "region = 2 * below[:, None].int() + right",
        "region = 0 * below[:, None].int() + right",
    ),
    "no seam between columns": ("+ right[None, :].int()", "+ 0 * right[None, :].int()"),
    "both seams alike": ("region = 2 * below", "region = 1 * below"),
    "a seam without a shift": (">= (H - shift[0] if shift[0] else H)", ">= H - max(shift[0], 1)"),
    "seam one row late": (">= (H - shift[0] if", "> (H - shift[0] if"),
    "seam one column early": (
        ">= (W - shift[1] if shift[1] else W)",
        ">= (W - shift[1] - 1 if shift[1] else W)",
    ),
    "seam by the window's height": ("(W - shift[1] if shift[1]", "(W - shift[0] if shift[1]"),
    "shift the other way": (
        "torch.roll(x, (-shift[0], -shift[1]), (1, 2))",
        "torch.roll(x, tuple(shift), (1, 2))",
    ),
    "shifts swapped": ("(-shift[0], -shift[1]), (1, 2)", "(-shift[1], -shift[0]), (1, 2)"),
    "not rolled back": (
        "return torch.roll(x, tuple(shift), (1, 2)) if any(shift) else x",
        "return x",
    ),
    "axes of the roll swapped": (
        "(-shift[0], -shift[1]), (1, 2)",
        "(-shift[0], -shift[1]), (2, 1)",
    ),
    "windows column-major": (
        "W // Ww, Ww, C).transpose(2, 3)\n",
        "W // Ww, Ww, C).permute(0, 3, 1, 2, 4, 5)\n",
    ),
    "window turned": (
        "x.reshape(B, H // Wh, W // Ww, Wh, Ww, C)",
        "x.reshape(B, H // Wh, W // Ww, Ww, Wh, C).transpose(3, 4)",
    ),
    "index swapped": ("dy = row[:, None] - row[None, :]", "dy = row[None, :] - row[:, None]"),
    "columns of the index swapped": (
        "column[:, None] - column[None, :]",
        "column[None, :] - column[:, None]",
    ),
    "row length of the table": ("dy * (2 * Ww - 1)", "dy * (2 * Wh - 1)"),
    "columns of the table shared": (
        "column[None, :] + Ww - 1",
        "column[None, :] + Ww - 1 - (column[:, None] > 0).int()",
    ),
    "two columns as one": ("token // Ww, token % Ww", "token // Ww, token % Ww // 2"),
    "bias of another head": (
        "window, bias_table.device)].permute(2, 0, 1)",
        "window, bias_table.device)].permute(2, 0, 1).flip(0)",
    ),
    "no bias": (
        "s = s + position_bias(bias_table, window).to(s.dtype)",
        "s = s + 0 * position_bias(bias_table, window)",
    ),
    "scale lost": ("s = (q * scale) @ k", "s = q @ k"),
    "scale lost in the backward": ("dq, dk = scale * (ds @ k)", "dq, dk = (ds @ k)"),
    "dk without scale": (", scale * (ds.transpose(-1, -2) @ q)", ", (ds.transpose(-1, -2) @ q)"),
    "q and v swapped": (
        "unflatten(-1, (3, num_heads, -1))",
        "unflatten(-1, (3, num_heads, -1)).flip(3)",
    ),
    "heads innermost": (
        "unflatten(-1, (3, num_heads, -1)).permute",
        "unflatten(-1, (3, -1, num_heads)).transpose(4, 5).permute",
    ),
    "dq and dv swapped": ("pack([dq, dk, dv]", "pack([dv, dk, dq]"),
    "clamp forgotten": (".clamp(max=MAX_LOGIT_SCALE).exp()", ".exp()"),
    "clamp at 10": ("MAX_LOGIT_SCALE = math.log(100.0)", "MAX_LOGIT_SCALE = math.log(10.0)"),
    "gradient through the clamp": (
        "torch.where(below, dfactor",
        "torch.where(below | True, dfactor",
    ),
    "gradient of the factor itself": ("dfactor * factor(logit_scale, s).flatten()", "dfactor"),
    "cosine of q alone": (
        "unit(q) @ unit(k).transpose(-1, -2)\n",
        "unit(q) @ k.transpose(-1, -2)\n",
    ),
    "no gradient through the length": (
        "dunit - unit * (unit * dunit).sum(-1, keepdim=True)",
        "dunit",
    ),
    "dq without the factor": ("dq = _normalize_bwd(q, by * (ds", "dq = _normalize_bwd(q, (ds"),
    "dk of raw queries": (
        "by * (ds.transpose(-1, -2) @ unit(q))",
        "by * (ds.transpose(-1, -2) @ q)",
    ),
    "dtable transposed": ("ds.sum((0, 1)).flatten(1)", "ds.sum((0, 1)).transpose(1, 2).flatten(1)"),
    "dtable of one sample": ("ds.sum((0, 1)).flatten(1)", "ds[:1].sum((0, 1)).flatten(1)"),
    "dtable without the last window": (
        "ds.sum((0, 1)).flatten(1)",
        "ds[:, :-1].sum((0, 1)).flatten(1)",
    ),
    "dtable of another head": ("flatten(1).t())", "flatten(1).flip(0).t())"),
    "softmax gradient without its mean": ("p * (dp - (p * dp).sum(-1, keepdim=True))", "p * dp"),
    "dropout not scaled": (".to(p.dtype) / (1.0 - dropout_p))", ".to(p.dtype))"),
    "dropout not in dv": ("dv = dropout(p, seed, dropout_p).transpose", "dv = p.transpose"),
    "dropout not in dp": (
        "dp = dropout(dout @ v.transpose(-1, -2), seed, dropout_p)",
        "dp = dout @ v.transpose(-1, -2)",
    ),
    "dropout drops the others": (
        "keep_mask(seed, tuple(p.shape), dropout_p).to",
        "(~keep_mask(seed, tuple(p.shape), dropout_p)).to",
    ),
}


def problems():
    """What test_window_attention*.py are made of, one of each kind."""
    yield window_problem((2, 3), (1, 2), heads=2, D=8)
    yield window_problem((3, 2), (0, 1), heads=2, D=8, windows=(1, 3))
    yield window_problem((3, 2), (1, 0), heads=2, D=8, windows=(3, 1))
    yield window_problem((2, 3), (1, 1), D=8, logit_scale=[1.0, LN_100 + 1, 3.0, 2.0])
    yield window_problem((2, 3), (1, 1), heads=2, D=8, dropout_p=0.4)


def mutant(old, new):
    """The reference as a module of its own, with one text replaced."""
    with open(reference.__file__) as file:
        source = file.read()
    assert source.count(old) == 1, f"{old!r} is in reference.py {source.count(old)} times"
    spec = importlib.util.spec_from_file_location(reference.__name__, reference.__file__)
    module = importlib.util.module_from_spec(spec)
    exec(compile(source.replace(old, new), reference.__file__, "exec"), module.__dict__)
    return module


def caught():
    for problem in problems():
        try:
            check(problem, "reference", shape_class="planted faults")
        except AssertionError:
            return True
    return False


def test_the_reference_passes():
    for problem in problems():
        check(problem, "reference", shape_class="planted faults, none")


@pytest.mark.parametrize("name", MUTANTS)
def test_a_changed_line_is_caught(name, monkeypatch):
    module = mutant(*MUTANTS[name])
    monkeypatch.setattr(op, "overload", lambda called, backend: getattr(module, called))
    assert caught()
