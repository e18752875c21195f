"""The stock ways that our kernels are timed beside: each SDPA backend forced, FlexAttention
compiled, and torch.compile of eager and of SDPA."""

from __future__ import annotations

import functools

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitkernels.evidence import attention, window_attention
from vitkernels.evidence.contest import Way
from vitkernels.evidence.shapes import Contest
from vitkernels.evidence.subject import Subject

SDPA_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def peers(contest: Contest, subject: Subject) -> dict[str, Way]:
    """Without those that need torch.compile on a CPU, where only the machinery is tested."""
    found = {name: Way(function) for name, function in subject.peers.items()}
    if "SDPA" in subject.peers:
        for name, backend in SDPA_BACKENDS.items():
            within = lambda backend=backend: sdpa_kernel(backend)  # noqa: E731
            found[f"SDPA {name}"] = Way(subject.peers["SDPA"], within)
    if not torch.cuda.is_available():
        return found
    torch._dynamo.reset()
    found["compile eager"] = Way(torch.compile(subject.eager, dynamic=False))
    if "SDPA" in subject.peers:
        found["compile SDPA"] = Way(torch.compile(subject.peers["SDPA"], dynamic=False))
        found["FlexAttention"] = Way(flex(contest, subject))
    return found


def flex(contest: Contest, subject: Subject):
    """FlexAttention, compiled, with the bias and the mask in its score function."""
    options = dict(contest.row.options)
    if contest.row.op == "window_attention":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        window, shift = options["window"], options["shift"]
        return window_attention.Peer(flex_windows, subject.shape, window, shift, device)
    if contest.row.op == "attention":
        return flex_attention
    return attention.packed(flex_attention, subject.shape[2])


@functools.cache
def _flex():
    from torch.nn.attention import flex_attention as module

    return torch.compile(module.flex_attention, dynamic=False)


def flex_attention(q, k, v, bias=None):
    """q, k, v of (B, N, H, D); a bias of (1, H, N, N)."""

    def biased(score, b, h, i, j):
        return score + bias[0, h, i, j].to(score.dtype)

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return _flex()(q, k, v, score_mod=None if bias is None else biased).transpose(1, 2)


def flex_windows(q, k, v, bias, mask, scale):
    """The middle part of window_attention.Peer: windows are the batch."""

    def score(value, b, h, i, j):
        value = value + bias[0, h, i, j].to(value.dtype)
        return value if mask is None else value + mask[b % mask.shape[0], i, j].to(value.dtype)

    return _flex()(q, k, v, score_mod=score, scale=scale)
