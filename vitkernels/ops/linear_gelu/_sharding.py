"""How linear and linear_gelu run on DTensors: by rows, or by output features (column-parallel)."""

from ..._sharding import SUM, Split, dims


def linear_gelu_fwd(x, **_) -> list[Split]:
    outputs = ("y", "preactivation")
    rows: list[Split] = [(dims(d, *outputs), {"x": d}) for d in range(x.ndim - 1)]
    return [*rows, (dims(x.ndim - 1, *outputs), dims(0, "weight", "bias"))]


def linear_gelu_bwd(x, **_) -> list[Split]:
    rows: list[Split] = [
        (dims(d, "dx") | dims(SUM, "dweight", "dbias"), dims(d, "dy", "x", "preactivation"))
        for d in range(x.ndim - 1)
    ]
    features = dims(x.ndim - 1, "dy", "preactivation") | dims(0, "weight", "bias")
    return [*rows, (dims(SUM, "dx") | dims(0, "dweight", "dbias"), features)]
