"""patch_merge_layer_norm: memory layouts, missing gradients, and what may be touched."""

import itertools

import pytest
import torch
from patch_merge_problems import patch_merge_problem
from problems import DTYPE_IDS, backend_and_dtype, check

from vitkernels.testing import LAYOUTS, assert_bitwise_equal, available_for, grads_of, in_layout

BACKENDS = available_for("patch_merge_layer_norm")
FP32, BF16, FP16 = DTYPE_IDS

pytestmark = pytest.mark.usefixtures("poisoned_memory")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@backend_and_dtype(BACKENDS, DTYPE_IDS)
def test_layouts_of_inputs_and_gradients(backend, layout, dtype):
    problem = patch_merge_problem((3, 5, 4, 24), dtype)
    check(problem, backend, shape_class="5x4 C24", layout=layout)


@pytest.mark.parametrize("skip", range(1, 16))
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_every_misalignment(backend, skip):
    problem = patch_merge_problem((2, 2, 3, 40), BF16)
    check(problem, backend, shape_class="2x3 C40", layout=f"misaligned_{skip}")


@pytest.mark.parametrize("layout", ["ones", "transposed", "expanded", "sliced", "misaligned_1"])
@backend_and_dtype(BACKENDS, DTYPE_IDS)
def test_incoming_gradients(backend, layout, dtype):
    """`ones` is what .sum().backward() sends: one number, expanded with strides of 0."""
    problem = patch_merge_problem((3, 4, 5, 24), dtype)
    check(problem, backend, shape_class="4x5 C24", grad_layout=layout)


# Maps as models meet them: of a channels-first network, turned, and a window of a larger map.
VIEWS = {
    "channels first": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "height and width swapped": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "batch inside": lambda x: x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    "part of a larger map": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 2, 2, 1))[
        :, 2:-1, 1:-2, 3:-2
    ],
    "one pixel everywhere": lambda x: x[:, :1, :1].expand_as(x),
}


@pytest.mark.parametrize("view", VIEWS)
@backend_and_dtype(BACKENDS, (FP32, BF16))
def test_views_of_x(backend, dtype, view):
    """x is read where it lies; the result is that of a contiguous copy, bit for bit."""
    problem = patch_merge_problem((2, 5, 6, 24), dtype)
    problem.inputs["x"] = VIEWS[view](problem.inputs["x"])
    tensors = list(problem.inputs.values())
    dense = [t.contiguous() for t in tensors]
    incoming = [torch.randn(2, 3, 3, 96).to(dtype)]
    ours, copied = (
        sum(grads_of(problem.ours(backend), given, incoming), ()) for given in (tensors, dense)
    )
    assert_bitwise_equal(ours, copied, f"{backend} {view}")
    problem.laid_out = lambda layout: problem
    check(problem, backend, shape_class=f"5x6 C24 {view}", grad_layout="contiguous")


@pytest.mark.parametrize("layout", ["sliced", "misaligned_1", "nan_border", "expanded"])
@pytest.mark.parametrize("which", ["weight", "bias"])
@each_backend
def test_one_parameter_in_another_layout(backend, which, layout):
    problem = patch_merge_problem((2, 4, 4, 24))
    problem.inputs[which] = in_layout(problem.inputs[which], layout)
    problem.laid_out = lambda _: problem
    check(problem, backend, shape_class=f"4x4 C24 {which} alone", layout=layout,
          grad_layout="contiguous")  # fmt: skip


SUBSETS = [
    wanted for size in (1, 2) for wanted in itertools.combinations(("x", "weight", "bias"), size)
]


@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
@each_backend
def test_frozen_inputs(backend, wanted):
    """A frozen input gets no gradient, and the others' stay right."""
    problem = patch_merge_problem((2, 5, 3, 24))
    check(problem, backend, shape_class=f"C24 grads {'+'.join(wanted)}", wanted=wanted)


@each_backend
def test_outputs_are_contiguous_and_new(backend):
    problem = patch_merge_problem((2, 4, 5, 24)).laid_out("transposed")
    tensors = list(problem.inputs.values())
    y = problem.ours(backend)(*tensors)
    assert y.is_contiguous() and y.shape == (2, 2, 3, 96)
    assert y.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in tensors}


@backend_and_dtype(BACKENDS, DTYPE_IDS)
def test_no_images(backend, dtype):
    """An empty batch gives an empty output, and zero gradients of the parameters."""
    problem = patch_merge_problem((0, 5, 4, 24), dtype)
    (y,), grads = grads_of(problem.ours(backend), list(problem.inputs.values()))
    assert y.shape == (0, 3, 2, 96) and y.dtype == dtype
    for name, grad in zip(problem.inputs, grads, strict=True):
        assert grad.shape == problem.inputs[name].shape, name
        assert not grad.any(), name


@each_backend
def test_what_is_kept(backend):
    """Beside the inputs two numbers a row; the merged map is not."""
    if backend == "torch":
        return
    problem = patch_merge_problem((2, 4, 6, 24))
    leaves = [t.requires_grad_() for t in problem.inputs.values()]
    given, kept = {t.data_ptr() for t in leaves}, []

    def pack(tensor):
        if tensor.data_ptr() not in given:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        problem.ours(backend)(*leaves)
    assert kept == [(2, 2, 3), (2, 2, 3)]
