"""How window_attention runs on DTensors: by samples; a part of the heads, or of a shifted map,
would be another call."""

from ..._sharding import SUM, Split, dims


def window_attention_fwd(dropout_p, **_) -> list[Split]:
    if dropout_p > 0.0:  # its stream counts the scores of the whole tensor
        return []
    return [(dims(0, "out", "lse"), {"qkv": 0})]


def window_attention_bwd(dropout_p, **_) -> list[Split]:
    if dropout_p > 0.0:
        return []
    return [
        (
            dims(0, "dqkv") | dims(SUM, "dbias_table", "dlogit_scale"),
            dims(0, "dout", "qkv", "out", "lse"),
        )
    ]
