"""How add_layer_norm and layer_norm_add run on DTensors: rows are independent."""

from ..._sharding import SUM, Placements, Split, dims


def add_layer_norm_fwd(x, dropout_p, **_) -> list[Split]:
    if dropout_p > 0.0:  # its stream counts the elements of the whole tensor
        return []
    return [
        (dims(d, "y", "new_residual", "mean", "rstd"), dims(d, "x", "residual") | _of_samples(d))
        for d in range(x.ndim - 1)
    ]


def add_layer_norm_bwd(z, dropout_p, **_) -> list[Split]:
    if dropout_p > 0.0:
        return []
    rows = ("dy", "dnew_residual", "z", "mean", "rstd", "x")
    return [
        (
            dims(d, "dx", "dresidual") | dims(SUM, "dweight", "dbias", "dgamma"),
            dims(d, *rows) | _of_samples(d),
        )
        for d in range(z.ndim - 1)
    ]


def layer_norm_add_fwd(x, **_) -> list[Split]:
    return [
        (dims(d, "out", "mean", "rstd"), dims(d, "x", "residual") | _of_samples(d))
        for d in range(x.ndim - 1)
    ]


def layer_norm_add_bwd(x, **_) -> list[Split]:
    return [
        (
            dims(d, "dx") | dims(SUM, "dweight", "dbias"),
            dims(d, "dout", "x", "mean", "rstd") | _of_samples(d),
        )
        for d in range(x.ndim - 1)
    ]


def _of_samples(d: int) -> Placements:
    """row_scale has one factor a sample."""
    return {"row_scale": 0} if d == 0 else {}
