"""attention's backward on Hopper, forced: every gradient, what it refuses, what nvcc made of it,
and its launch plans. The forward takes whatever path serves."""

import dataclasses
import math

import pytest
import torch
from attention_paths import needs_kernels, needs_nvcc
from attention_problems import attention_problem, packed_problem
from compiled_code import counts, sass
from native_build import ROOT
from problems import DTYPE_IDS, Problem, check, check_repeats, output_gradients

from vitkernels import _native, testing
from vitkernels.testing import assert_bitwise_equal, cuda_path, grads_of

FP32, BF16, FP16 = DTYPE_IDS
INF = math.inf

pytestmark = pytest.mark.usefixtures("poisoned_memory")


class BackwardOnly(Problem):
    """What differentiates the call is outside it, where a path is forced."""

    def unseeded(self, backend=None):
        call = super().unseeded(backend)

        def forward_of_any_path(*tensors, **changes):
            with cuda_path("auto"):
                return call(*tensors, **changes)

        return forward_of_any_path


def backward_only(make, *arguments, **options):
    problem = make(*arguments, **options)
    return BackwardOnly(**{f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)})


@pytest.fixture
def sm90():
    with cuda_path("sm90"):
        yield


def run(problem, tensors=None, grads=None):
    tensors = list(problem.inputs.values()) if tensors is None else tensors
    with torch.no_grad():
        outputs = testing.as_tuple(problem.ours("cuda")(*tensors))
    return grads_of(problem.ours("cuda"), tensors, grads or output_gradients(problem, outputs))[1]


# ---- Values

CASES = [  # packed or with Nk; B, N, H, D; dtype
    ((1, 1, 1, 64), BF16, None),
    ((2, 2, 1, 16), FP16, None),
    ((3, 49, 4, 32), BF16, None),  # 12 items on 8 blocks
    ((1, 64, 1, 64), FP16, None),
    ((1, 65, 2, 64), BF16, None),
    ((1, 144, 1, 32), BF16, None),
    ((1, 144, 1, 48), FP16, None),
    ((1, 196, 1, 64), BF16, None),
    ((2, 197, 2, 64), BF16, None),  # 4 items on 2 blocks
    ((1, 197, 1, 16), FP16, None),
    ((1, 198, 1, 64), FP16, None),
    ((1, 201, 1, 64), BF16, None),
    ((3, 256, 1, 64), BF16, None),  # q comes twice
    ((1, 256, 1, 32), FP16, None),
    ((1, 231, 1, 56), FP16, None),
    ((1, 17, 1, 8), BF16, None),
    ((1, 60, 1, 64), BF16, 130),
    ((1, 230, 1, 64), FP16, 13),
    ((2, 3, 1, 40), BF16, 209),
    ((1, 256, 1, 64), BF16, 1),
]


@needs_kernels
@pytest.mark.parametrize(("shape", "dtype", "Nk"), CASES, ids=str)
def test_every_gradient(sm90, shape, dtype, Nk):
    if Nk is None:
        problem = backward_only(packed_problem, *shape, dtype)
    else:
        problem = backward_only(attention_problem, *shape, dtype, Nk=Nk)
    factor = 0.9 if min(shape[1], Nk or shape[1]) >= 49 else None
    name = f"sm90 backward N{shape[1]} D{shape[3]}" + (f" Nk{Nk}" if Nk else "")
    check(problem, "cuda", shape_class=name, rmse_factor=factor)


@needs_kernels
@pytest.mark.parametrize(
    ("layout", "grad_layout"),
    [
        ("outer_transposed", "contiguous"),
        ("rows_sliced", "packed"),
        ("packed", "rows_sliced"),
        ("offset", "outer_transposed"),
        ("sliced", "transposed"),  # not along D: copies, which the launcher makes
        ("contiguous", "ones"),  # of .sum().backward(), expanded
    ],
)
def test_layouts(sm90, layout, grad_layout):
    problem = backward_only(attention_problem, 2, 65, 2, 32, BF16, Nk=50)
    shape_class = "sm90 backward N65 Nk50 D32"
    check(problem, "cuda", shape_class=shape_class, layout=layout, grad_layout=grad_layout)


BIASES = [  # shape for B, H, N; B, N, H, D; dtype of q, k, v and of the bias; Nk
    (lambda B, H, N: (1, H, N, N), (5, 20, 4, 32), BF16, FP32),  # 2 or 3 items a block
    (lambda B, H, N: (1, H, N, N), (3, 66, 1, 64), FP16, FP16),
    (lambda B, H, N: (1, 1, N, N), (2, 20, 2, 64), BF16, BF16),
    (lambda B, H, N: (B, H, N, N), (2, 20, 2, 64), BF16, FP32),
    (lambda B, H, N: (B, 1, N, N), (2, 18, 3, 32), FP16, FP32),
    (lambda B, H, N: (1, H, 1, N), (2, 20, 2, 64), BF16, FP32),
    (lambda B, H, N: (B, 1, 1, N), (2, 49, 2, 64), BF16, FP32),
    (lambda B, H, N: (1, H, N, 1), (2, 20, 2, 64), BF16, FP32),
    (lambda B, H, N: (1, 1, 1, 1), (2, 20, 2, 64), FP16, FP32),
    (lambda B, H, N: (1, H, N, N), (1, 197, 1, 64), BF16, FP32),
    (lambda B, H, N: (1, H, N, N), (3, 210, 1, 64), BF16, BF16),
]


@needs_kernels
@pytest.mark.parametrize("case", BIASES, ids=lambda c: f"{c[0](*'BHN')} {c[1]} {DTYPE_IDS[c[3]]}")
def test_bias(sm90, case):
    make_shape, (B, N, H, D), dtype, bias_dtype = case
    shape = make_shape(B, H, N)
    problem = backward_only(attention_problem, B, N, H, D, dtype, bias=shape, bias_dtype=bias_dtype)
    form = "x".join("1" if n == 1 else "N" for n in shape)
    check(problem, "cuda", shape_class=f"sm90 backward N{N} D{D} bias {form}")


@needs_kernels
def test_a_batch_of_one_adds_nothing_to_dbias(sm90):
    """Each item's own dbias and the shared one: the same terms, the latter added up."""
    problem = backward_only(attention_problem, 3, 20, 2, 32, BF16, bias=(1, 2, 20, 20),
                            bias_dtype=FP32)  # fmt: skip
    q, k, v, bias = problem.inputs.values()
    grads = [torch.randn(3, 20, 2, 32).to(BF16)]
    each = run(problem, [q, k, v, bias.expand(3, -1, -1, -1).clone()], grads)
    shared = run(problem, [q, k, v, bias], grads)
    assert_bitwise_equal(shared[:3], each[:3])
    torch.testing.assert_close(shared[3], each[3].double().sum(0, keepdim=True).float())


# ---- Masks and special values


@needs_kernels
@pytest.mark.parametrize("N", [33, 200])
def test_masked_by_the_bias(sm90, N):
    """-inf masks; a fully masked row has no gradient, and garbage at a masked key none either."""
    problem = backward_only(attention_problem, 1, N, 1, 64, BF16, bias=(1, 1, N, N))
    bias = problem.inputs["bias"]
    bias[..., 5, :] = -INF
    bias[..., :, 7] = -INF
    bias[..., 9, 10:] = -INF
    check(problem, "cuda", shape_class=f"sm90 backward N{N} D64, masked by the bias")
    dq, dk, dv, dbias = run(problem)
    for nothing in (dq[:, 5], dk[:, 7], dv[:, 7], dbias[..., 5, :], dbias[..., 7]):
        assert not nothing.any()


@needs_kernels
@pytest.mark.parametrize("bias", [None, (1, 2, 70, 70)], ids=["", "bias"])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (1, 69, 1, 31)], ids=["first", "last"])
def test_nan_spreads_as_in_the_reference(sm90, where, place, bias):
    problem = backward_only(attention_problem, 2, 70, 2, 32, BF16, bias=bias)
    problem.inputs[where][place] = math.nan
    tensors = list(problem.inputs.values())
    grads = [torch.randn(2, 70, 2, 32).to(BF16)]
    expected = grads_of(problem.ours("reference"), tensors, grads)[1]
    for name, mine, theirs in zip(
        problem.inputs, run(problem, tensors, grads), expected, strict=True
    ):
        assert not testing.same_specials(mine, theirs, f"d{name}")


@needs_kernels
@pytest.mark.parametrize("magnitude", [30.0, 1e3], ids=str)
def test_large_logits(sm90, magnitude):
    problem = backward_only(attention_problem, 1, 66, 1, 64, BF16, magnitude=magnitude)
    # Rows are nearly one-hot: few values decide, too few for an exact test of truncation.
    shape_class = f"sm90 backward N66 D64 logits times {magnitude}"
    check(problem, "cuda", shape_class=shape_class, slack=1.1)
    problem.inputs["q"][:] = -problem.inputs["k"][:, :1]  # lse far below zero
    problem.inputs["q"] *= magnitude
    assert all(torch.isfinite(g).all() for g in run(problem))


# ---- The same bits


@needs_kernels
@pytest.mark.parametrize("N", [50, 197, 210])
def test_repeats_and_unwanted_gradients(sm90, N):
    problem = backward_only(attention_problem, 1, N, 2, 64, BF16, bias=(1, 2, N, N))
    check_repeats(problem, "cuda", (["q"], ["k"], ["v"], ["bias"], ["q", "v"], ["k", "bias"]))


@needs_kernels
def test_a_split_batch_gives_the_same_bits(sm90):
    """Whatever item a block had before."""
    problem = backward_only(packed_problem, 6, 70, 2, 64, BF16)
    (qkv,) = problem.inputs.values()
    grads = torch.randn(6, 70, 128).to(BF16)
    (whole,) = run(problem, [qkv], [grads])
    for item in range(6):
        (part,) = run(problem, [qkv[item : item + 1]], [grads[item : item + 1]])
        assert_bitwise_equal(part, whole[item : item + 1])


# ---- Refusals


@needs_kernels
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dtype": FP32}, "bf16 and fp16"),
        ({"D": 20}, "multiples of 8"),
        ({"dropout_p": 0.5}, "no dropout"),
        ({"key_padding_mask": (2, 5)}, "no key_padding_mask"),
        ({"bool_bias": (1, 1, 5, 5)}, "no bool bias"),
    ],
    ids=str,
)
def test_refusals(sm90, options, why):
    options = {"N": 5, "D": 16, "dtype": BF16} | options
    N, D, dtype = (options.pop(name) for name in ("N", "D", "dtype"))
    problem = backward_only(attention_problem, 2, N, 1, D, dtype, **options)
    with pytest.raises(RuntimeError, match=why):
        run(problem)


@needs_kernels
@pytest.mark.parametrize("layout", ["misaligned_1", "misaligned_3", "nan_border", "expanded"])
def test_refused_layouts(sm90, layout):
    for laid_out, name in (("q", "q, k and v"), ("v", "q, k and v"), ("dout", "dout")):
        problem = backward_only(attention_problem, 2, 5, 1, 16, BF16)
        grad = torch.randn(2, 5, 1, 16).to(BF16)
        if laid_out == "dout":
            grad = testing.in_layout(grad, layout)
        else:
            problem.inputs[laid_out] = testing.in_layout(problem.inputs[laid_out], layout)
        with pytest.raises(RuntimeError, match=f"rows of {name} must begin on 16-byte lines"):
            run(problem, grads=[grad])


@needs_kernels
def test_a_transposed_bias_is_refused(sm90):
    problem = backward_only(attention_problem, 1, 5, 1, 16, BF16, bias=(1, 1, 5, 5))
    problem.inputs["bias"] = problem.inputs["bias"].mT
    with pytest.raises(RuntimeError, match="keys of the bias must lie side by side"):
        run(problem)


# ---- Plans

needs_plans = pytest.mark.skipif(
    not hasattr(_native.build_facts(), "attention_sm90_backward_plan"),
    reason="vitkernels._C is not built (it needs Python.h and pybind11)",
)
WIDTHS = (64, 144, 200, 208, 256)


def plan(N, D, Nk=None, B=256, H=12, multiprocessors=132, bias="none"):
    facts = _native.build_facts()
    return facts.attention_sm90_backward_plan(B, H, N, Nk or N, D, multiprocessors, bias)


@needs_plans
@pytest.mark.parametrize("D", range(16, 129, 8))
def test_plans(D):
    for N in range(1, 1601):
        p = plan(N, D)
        assert p["serves"] == (N <= 256 and D <= 64)
        if not p["serves"]:
            continue
        assert p["width"] == next(w for w in WIDTHS if w >= N)
        assert p["rows"] == -(-p["width"] // 16) * 16 and p["rows"] <= 256  # of a TMA box
        assert p["depth"] >= D and p["depth"] in (32, 64)
        tile = p["rows"] * 2 * p["depth"]
        columns = p["rows"] if p["rows"] % 64 == 16 else -(-p["width"] // 64) * 64
        tiles = 3 if p["late_v"] else 5  # q, k, dout; v, the next q
        assert p["shared_bytes"] == tiles * tile + 2 * p["rows"] * columns + 64
        # A multiprocessor has 228 KB, of which each block takes 1 KB more than it asks for.
        assert p["shared_bytes"] <= 232448
        assert (p["shared_bytes"] + 1024) * p["resident_blocks"] <= 228 << 10
        assert p["late_v"] == (N > 208 and p["depth"] == 64)
        assert p["rows"] >= 64  # that wgmma reads
        assert p["warpgroups"] * 128 * p["resident_blocks"] <= 2048


@needs_plans
def test_plans_of_the_shapes_that_count():
    p = plan(197, 64)
    assert 197 * 197 / (256 * p["width"]) >= 0.75  # of the products' scores are asked for
    assert (p["blocks"], p["groups"], p["matrices"]) == (132, 1, 0)
    assert p["shared_bytes"] == 219712 and p["warpgroups"] == 2
    p = plan(197, 64, bias="shared")
    assert (p["blocks"], p["groups"], p["matrices"]) == (132, 11, 132)
    assert plan(197, 64, bias="per_item")["matrices"] == 256 * 12
    assert plan(49, 32, B=8, H=3)["blocks"] == 24
    assert plan(49, 32, B=4096, H=3)["blocks"] == 132 * 4
    assert plan(49, 32, B=4096, H=3, bias="shared")["blocks"] == 132 * 4
    assert plan(64, 64, B=2, H=1000, bias="shared")["blocks"] == 1000
    assert plan(1, 64, Nk=256)["width"] == plan(256, 64, Nk=1)["width"] == 256


@needs_plans
@pytest.mark.parametrize("width", WIDTHS)
def test_every_score_has_one_place(width):
    place = _native.build_facts().attention_sm90_backward_place
    size, rows = plan(width, 64)["matrix_floats"], -(-width // 64) * 64
    places = {place(width, i, j) for i in range(rows) for j in range(width)}
    assert places == set(range(size))


# ---- The compiled code


def instance(width, depth):
    """HGMMA of a kernel: a product for each 16 k; S, dP; dQ, dV, dK, the latter two for the narrow
    panel besides. UTMALDG: loads before the loop and in it. No local memory."""
    steps = -(-width // 16)
    panels = 2 if steps % 4 == 1 else 1
    products = 2 * depth // 16 + steps + 2 * panels * steps
    return {"HGMMA": products, "UTMALDG": 8, "LDL": 0, "STL": 0}


@needs_nvcc
def test_instructions_are_those_of_the_plan():
    name = "attention_attention_sm90_backward.cu.cuda.o"
    code = sass(ROOT / "build/native/inplace/obj" / name, "sm_90a")
    kernels = {k: v for k, v in code.items() if k.startswith("backward_kernel")}
    assert len(kernels) == 2 * 2 * (len(WIDTHS) + 3)  # types, bias; depth 32 for three widths
    for kernel, lines in kernels.items():
        _, width, depth, _ = map(int, kernel.partition("<")[2].rstrip(">").split(","))
        expected = instance(width, depth)
        assert counts(lines, expected) == expected, kernel
        wide = f"HGMMA.64x{width}x16"
        if width != depth:
            assert sum(wide in line for line in lines) == 2 * depth // 16, kernel  # S and dP
        assert not [line for line in lines if "ATOM" in line or line.startswith("RED")], kernel
