"""How attention runs on DTensors: samples, heads and queries are independent of each other."""

from ..._sharding import SUM, Placements, Split

# The dimension of each tensor along which samples, heads and queries lie; bias has them as 0, 1, 2.
SAMPLES: Split = ({"out": 0, "lse": 0}, {"q": 0, "k": 0, "v": 0, "key_padding_mask": 0})
HEADS: Split = ({"out": 2, "lse": 1}, {"q": 2, "k": 2, "v": 2})
QUERIES: Split = ({"out": 1, "lse": 2}, {"q": 1})


def attention_fwd(bias, dropout_p, **_) -> list[Split]:
    if dropout_p > 0.0:  # its stream counts the scores of the whole tensor
        return []
    return [
        (outputs, inputs | _of_bias(bias, dim))
        for dim, (outputs, inputs) in enumerate((SAMPLES, HEADS, QUERIES))
    ]


def attention_bwd(bias, dropout_p, **_) -> list[Split]:
    if dropout_p > 0.0:
        return []
    splits: list[Split] = []
    for dim, (outputs, inputs) in enumerate((SAMPLES, HEADS, QUERIES)):
        of_bias = _of_bias(bias, dim)
        grads = {f"d{name}": inputs.get(name, SUM) for name in "qkv"}
        grads["dbias"] = of_bias.get("bias", SUM)
        splits.append((grads, inputs | outputs | {"dout": outputs["out"]} | of_bias))
    return splits


def attention_qkvpacked_fwd(bias, dropout_p, **_) -> list[Split]:
    """Samples only: a part of the heads would be another num_heads."""
    if dropout_p > 0.0:
        return []
    samples = {"qkv": 0, "key_padding_mask": 0} | _of_bias(bias, 0)
    return [({"out": 0, "lse": 0}, samples)]


def attention_qkvpacked_bwd(bias, dropout_p, **_) -> list[Split]:
    if dropout_p > 0.0:
        return []
    of_bias = _of_bias(bias, 0)
    samples = {"dout": 0, "qkv": 0, "out": 0, "lse": 0, "key_padding_mask": 0}
    return [({"dqkv": 0, "dbias": of_bias.get("bias", SUM)}, samples | of_bias)]


def _of_bias(bias, dim: int) -> Placements:
    """A bias that is the same for all samples, heads or queries goes to every process."""
    return {"bias": dim} if bias is not None and bias.shape[dim] != 1 else {}
