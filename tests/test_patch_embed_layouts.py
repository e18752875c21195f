"""patch_embed: memory layouts, missing gradients, and what may be touched."""

import itertools

import pytest
import torch
from patch_embed_problems import IMAGE_LAYOUTS, MEAN, STD, UINT8, images_in, patch_embed_problem
from problems import DTYPE_IDS, INPUT_DTYPE_IDS, backend_and_dtype, check

from vitkernels import testing
from vitkernels.ops import patch_embed
from vitkernels.testing import LAYOUTS, assert_bitwise_equal, available_for, grads_of, in_layout

BACKENDS = available_for("patch_embed")
FP32, BF16, FP16 = DTYPE_IDS
KERNELS = [name for name in BACKENDS if name not in ("torch", "reference")]

pytestmark = pytest.mark.usefixtures("poisoned_memory")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
IMAGES = (UINT8, FP32, BF16, FP16)


def small(backend, images=UINT8, dtype=FP32, grid=(3, 4), patch=8, D=24, **options):
    """In the interpreter fp32 only."""
    if backend == "triton":
        images, dtype = (images if images == UINT8 else FP32), FP32
    return patch_embed_problem(grid, patch, D, images, dtype, **options)


# ---- Layouts


@pytest.mark.parametrize("patch", (4, 16, (14, 7)), ids=str)
@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@backend_and_dtype(BACKENDS, IMAGES, "images")
def test_layouts_of_images(backend, images, layout, patch):
    dtype = BF16 if images == BF16 else FP32
    problem = small(backend, images, dtype, patch=patch, D=40)
    check(problem, backend, shape_class=f"patch {patch} D40", layout=layout,
          grad_layout="contiguous")  # fmt: skip


@pytest.mark.parametrize("Cin", (1, 4))
@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@each_backend
def test_layouts_of_images_of_other_channels(backend, layout, Cin):
    problem = small(backend, Cin=Cin)
    check(problem, backend, shape_class=f"patch 8 D24 Cin {Cin}", layout=layout,
          grad_layout="contiguous")  # fmt: skip


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@backend_and_dtype(KERNELS, IMAGES, "images")
def test_every_layout_of_the_images_gives_the_same_bits(backend, images, layout):
    problem = small(backend, images, BF16 if images == BF16 else FP32)
    if layout == "one_image":
        problem.inputs["images"] = problem.inputs["images"][:1].repeat(2, 1, 1, 1)
    plain, other = list(problem.inputs.values()), list(problem.laid_out(layout).inputs.values())
    incoming = [torch.randn(2, 13, 24)]
    expected = grads_of(problem.ours(backend), plain, incoming)
    mine = grads_of(problem.ours(backend), other, incoming)
    assert_bitwise_equal(sum(mine, ()), sum(expected, ()), layout)


@pytest.mark.parametrize("images", ("uint8", "float"))
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@backend_and_dtype(BACKENDS, DTYPE_IDS)
def test_layouts_of_inputs_and_gradients(backend, layout, images, dtype):
    """Weight, position and prefix tokens too; nothing around any of them is read."""
    problem = small(backend, UINT8 if images == "uint8" else dtype, dtype)
    check(problem, backend, shape_class="patch 8 D24", layout=layout)


@pytest.mark.parametrize("skip", range(1, 16))
@pytest.mark.parametrize("images", (UINT8, BF16), ids=INPUT_DTYPE_IDS.get)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_every_misalignment(backend, images, skip):
    problem = small(backend, images, BF16, (2, 2), 16, 32)
    check(problem, backend, shape_class="patch 16 D32", layout=f"misaligned_{skip}")


@pytest.mark.parametrize("layout", ["ones", "transposed", "expanded", "sliced", "misaligned_1"])
@backend_and_dtype(BACKENDS, DTYPE_IDS)
def test_incoming_gradients(backend, layout, dtype):
    """`ones` is what .sum().backward() sends: one number, expanded with strides of 0."""
    for images in (UINT8, dtype):
        problem = small(backend, images, dtype)
        check(problem, backend, shape_class="patch 8 D24", grad_layout=layout)


@pytest.mark.parametrize("which", ("weight", "pos_embed", "prefix_tokens"))
@pytest.mark.parametrize("layout", ["transposed", "sliced", "rows_sliced", "nan_border"])
@each_backend
def test_one_parameter_in_another_layout(backend, layout, which):
    problem = small(backend, prefix=3, D=40)
    problem.inputs[which] = in_layout(problem.inputs[which], layout)
    problem.laid_out = lambda _: problem
    check(problem, backend, shape_class=f"patch 8 D40 {which} alone", layout=layout,
          grad_layout="contiguous")  # fmt: skip


@pytest.mark.parametrize("mean", ("sliced", "expanded"))
@each_backend
def test_strided_statistics(backend, mean):
    given = torch.tensor(MEAN).repeat_interleave(2)[::2]
    if mean == "expanded":
        given = torch.tensor([0.3]).expand(3)
    problem = small(backend, mean=given, std=torch.tensor(STD))
    check(problem, backend, shape_class=f"patch 8 D24 mean {mean}")


@backend_and_dtype(BACKENDS, IMAGES, "images")
def test_flipped_images(backend, images):
    """torch.flip copies, and keeps channels_last: the mirrored weight sees the same patches."""
    problem = small(backend, images, FP32, pos=None, prefix=None)
    image, weight, bias, *_ = problem.inputs.values()
    image = images_in(image, "channels_last")
    options = {**problem.options, "backend": backend}
    tokens = patch_embed(image, weight, bias, **options).unflatten(1, (3, 4))
    mirrored = patch_embed(image.flip(3), weight.flip(3), bias, **options).unflatten(1, (3, 4))
    tolerance = 1e-5 if tokens.dtype == FP32 else 2e-2
    torch.testing.assert_close(mirrored.flip(2), tokens, rtol=tolerance, atol=tolerance)


# ---- Gradients of some inputs only

INPUTS = ("images", "weight", "bias", "pos_embed", "prefix_tokens")
SUBSETS = [w for size in range(1, 5) for w in itertools.combinations(INPUTS, size)]


@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
@each_backend
def test_frozen_inputs(backend, wanted):
    """A frozen input gets no gradient, and the others' stay right."""
    problem = small(backend, FP32)
    check(problem, backend, shape_class=f"patch 8 D24 grads {'+'.join(wanted)}", wanted=wanted)


@pytest.mark.parametrize(
    "wanted", [("weight",), ("bias",), ("pos_embed",), ("prefix_tokens",), ("weight", "pos_embed")],
    ids="+".join,
)  # fmt: skip
@pytest.mark.parametrize("pos", ("all", "patches"))
@each_backend
def test_frozen_inputs_of_uint8_images(backend, pos, wanted):
    """The weight's gradient needs the sum that the bias's is, wanted or not."""
    problem = small(backend, pos=pos, prefix=2)
    shape_class = f"uint8 patch 8 D24 pos {pos} grads {'+'.join(wanted)}"
    check(problem, backend, shape_class=shape_class, wanted=wanted)


@each_backend
def test_the_weight_without_bias_has_its_constant_term(backend):
    problem = small(backend, bias=False, pos=None, prefix=None, mean=0.1, std=0.05)
    check(problem, backend, shape_class="patch 8 D24 bare, mean 0.1")


@each_backend
def test_uint8_images_get_no_gradient(backend):
    problem = small(backend)
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in problem.inputs.values()]
    problem.ours(backend)(*leaves).sum().backward()
    assert leaves[0].grad is None and all(t.grad is not None for t in leaves[1:])


@pytest.mark.parametrize("images", (UINT8, BF16), ids=INPUT_DTYPE_IDS.get)
@each_backend
def test_no_images(backend, images):
    """An empty batch gives no tokens, and zero gradients of the parameters."""
    problem = small(backend, images, BF16, B=0)
    (tokens,), grads = grads_of(problem.ours(backend), list(problem.inputs.values()))
    assert tokens.shape == (0, 13, 24)
    for (name, given), grad in zip(problem.inputs.items(), grads, strict=True):
        if given.is_floating_point():
            assert grad.shape == given.shape and not grad.any(), name


@backend_and_dtype(BACKENDS, IMAGES, "images")
def test_tokens_are_contiguous_and_new(backend, images):
    problem = small(backend, images).laid_out("channels_last")
    tensors = list(problem.inputs.values())
    tokens = problem.ours(backend)(*tensors)
    assert tokens.is_contiguous() and tokens.shape == (2, 13, 24)
    given = {t.untyped_storage().data_ptr() for t in tensors}
    assert tokens.untyped_storage().data_ptr() not in given


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
def test_nothing_but_the_inputs_is_kept(backend):
    """No normalised image, no patches: what im2col and ToTensor would keep for the backward."""
    problem = small(backend)
    given = {t.data_ptr() for t in problem.inputs.values()}
    kept = []

    def pack(tensor):
        if tensor.data_ptr() not in given:
            kept.append(tuple(tensor.shape))
        return tensor

    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in problem.inputs.values()]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        problem.ours(backend)(*leaves)
    assert kept == [(3,), (3,)], "mean and std, made of floats"


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
def test_gradients_do_not_share_memory(backend):
    """bias, position and prefix gradients are sums of one tensor, but never views of it."""
    problem = small(backend, FP32, B=1)
    leaves = [t.requires_grad_() for t in problem.inputs.values()]
    tokens = problem.ours(backend)(*leaves)
    incoming = torch.randn_like(tokens)
    before = incoming.clone()
    grads = torch.autograd.grad(tokens, leaves, incoming)
    storages = [t.untyped_storage().data_ptr() for t in (incoming, *grads)]
    assert len({*storages}) == len(storages)
    testing.assert_bitwise_equal(incoming, before)
