"""What the tests of interpreted Triton kernels share: raw outputs against the truth, in fp32."""

from vitkernels import testing


def compare(ours, base, truth, what, layout="contiguous", dtype="fp32", slack=1.0):
    """ours, base, truth: the outputs of a raw operator; None where the truth has None."""
    present = [i for i, t in enumerate(truth) if t is not None]
    assert [i for i, t in enumerate(ours) if t is not None] == present, what
    picked = [[outputs[i] for i in present] for outputs in (ours, base, truth)]
    testing.assert_close_to_truth(*picked, what=what, slack=slack)
    testing.cases.record(what.split(" ")[0], "triton", dtype, what, layout)


def double(*tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
