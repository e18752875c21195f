"""How patch_merge_layer_norm runs on DTensors: by samples."""

from ..._sharding import SUM, Split, dims


def patch_merge_layer_norm_fwd(**_) -> list[Split]:
    return [(dims(0, "y", "mean", "rstd"), {"x": 0})]


def patch_merge_layer_norm_bwd(**_) -> list[Split]:
    return [(dims(0, "dx") | dims(SUM, "dweight", "dbias"), dims(0, "dy", "x", "mean", "rstd"))]
