"""attention and attention_qkvpacked: memory layouts, missing gradients, and what may be touched."""

import itertools

import pytest
import torch
from attention_problems import attention_problem, packed_problem
from problems import DTYPE_IDS, check

from vitkernels.ops import attention, attention_qkvpacked
from vitkernels.testing import LAYOUTS, available_for, grads_of, in_layout

BACKENDS = available_for("attention", D=64)
FP32, BF16, FP16 = DTYPE_IDS

pytestmark = pytest.mark.usefixtures("poisoned_memory")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPE_IDS, ids=DTYPE_IDS.get)


def small(backend, dtype, **options):
    """Two batch items and heads, 18 tokens; in the interpreter fp32 only."""
    return attention_problem(2, 18, 2, 24, FP32 if backend == "triton" else dtype, **options)


@each_dtype
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@each_backend
def test_layouts_of_inputs_and_gradients(backend, layout, dtype):
    problem = small(backend, dtype, bias=(2, 2, 18, 18))
    check(problem, backend, shape_class="N18 D24 bias", layout=layout)


@each_dtype
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@each_backend
def test_layouts_of_packed_inputs(backend, layout, dtype):
    dtype = FP32 if backend == "triton" else dtype
    problem = packed_problem(2, 18, 2, 24, dtype)
    check(problem, backend, shape_class="N18 D24", layout=layout)


@pytest.mark.parametrize("skip", range(1, 16))
@each_backend
def test_every_misalignment(backend, skip):
    problem = small(backend, BF16)
    check(problem, backend, shape_class="N18 D24", layout=f"misaligned_{skip}")


@each_dtype
@pytest.mark.parametrize("layout", ["ones", "transposed", "expanded", "sliced", "misaligned_1"])
@each_backend
def test_incoming_gradients(backend, layout, dtype):
    """`ones` is what .sum().backward() sends: one number, expanded with strides of 0."""
    check(small(backend, dtype), backend, shape_class="N18 D24", grad_layout=layout)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced", "nan_border"])
@pytest.mark.parametrize(
    "shape", [(1, 2, 18, 18), (2, 1, 18, 18), (2, 2, 1, 18), (18, 18)], ids=str
)
@each_backend
def test_layouts_of_the_bias(backend, shape, layout):
    problem = small(backend, FP32, bias=shape)
    problem.inputs["bias"] = in_layout(problem.inputs["bias"], layout)
    plain = {name: t for name, t in problem.inputs.items() if name != "bias"}
    bias = problem.inputs["bias"]

    def call(*tensors):
        named = dict(zip((*plain, "bias"), tensors, strict=True))
        return attention(**named, backend=backend)

    out, grads = grads_of(call, [*plain.values(), bias])
    expected, expected_grads = grads_of(call, [*plain.values(), bias.contiguous()])
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-5, atol=1e-5)
    check(problem, backend, shape_class=f"N18 D24 bias {shape}", layout="contiguous")


@pytest.mark.parametrize("masks", ["bool", "padding"])
@each_backend
def test_strided_masks(backend, masks):
    problem = small(backend, FP32, bool_bias=(2, 2, 18, 18), key_padding_mask=(2, 18))
    expected = problem.ours(backend)(*problem.inputs.values())
    name = "bias" if masks == "bool" else "key_padding_mask"
    for layout in ("transposed", "sliced", "nan_border", "misaligned_1"):
        problem.options[name] = in_layout(problem.options[name], layout)
        out = problem.ours(backend)(*problem.inputs.values())
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@each_backend
def test_the_three_views_of_a_linear_output(backend):
    """q, k, v as timm unbinds them, beside the packed operator on the same memory."""
    qkv = torch.randn(2, 18, 3 * 2 * 24)
    packed, (dqkv,) = grads_of(lambda t: attention_qkvpacked(t, 2, backend=backend), [qkv])

    def unbound(t):
        q, k, v = t.unflatten(2, (3, 2, 24)).unbind(2)
        return attention(q, k, v, backend=backend).flatten(2)

    out, (expected,) = grads_of(unbound, [qkv])
    torch.testing.assert_close(packed, out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dqkv, expected, rtol=1e-5, atol=1e-6)


INPUTS = ("q", "k", "v", "bias")
SUBSETS = [w for size in range(1, 4) for w in itertools.combinations(INPUTS, size)]


@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
@each_backend
def test_frozen_inputs(backend, wanted):
    """A frozen input gets no gradient, and the others' stay right."""
    problem = small(backend, FP32, bias=(1, 2, 18, 18))
    check(problem, backend, shape_class=f"N18 D24 grads {'+'.join(wanted)}", wanted=wanted)


@pytest.mark.parametrize("wanted", ["qkv", "bias"])
@each_backend
def test_frozen_inputs_of_the_packed_form(backend, wanted):
    problem = packed_problem(2, 18, 2, 24, bias=(1, 2, 18, 18))
    check(problem, backend, shape_class=f"N18 D24 grads {wanted}", wanted=(wanted,))


@each_backend
def test_one_tensor_as_query_key_and_value(backend):
    x = torch.randn(2, 18, 2, 24)
    incoming = [torch.randn(2, 18, 2, 24)]
    _, (together,) = grads_of(lambda t: attention(t, t, t, backend=backend), [x], incoming)
    _, apart = grads_of(
        lambda *t: attention(*t, backend=backend), [x, x.clone(), x.clone()], incoming
    )
    torch.testing.assert_close(together, sum(apart), rtol=1e-5, atol=1e-5)


@each_backend
def test_outputs_are_contiguous(backend):
    problem = small(backend, FP32).laid_out("outer_transposed")
    assert problem.ours(backend)(*problem.inputs.values()).is_contiguous()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
def test_an_empty_batch(backend):
    """No samples: an empty result, and zero gradients of a bias that every sample shares."""
    problem = attention_problem(0, 18, 2, 24, bias=(1, 2, 18, 18))
    out, grads = grads_of(problem.ours(backend), list(problem.inputs.values()))
    assert out[0].shape == (0, 18, 2, 24)
    assert all(g.shape == t.shape for g, t in zip(grads, problem.inputs.values(), strict=True))
    assert not grads[-1].any()
