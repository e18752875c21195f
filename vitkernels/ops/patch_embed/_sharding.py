"""How patch_embed runs on DTensors: by samples, or by channels of the embedding."""

from ..._sharding import SUM, Placements, Split, dims

CHANNELS: Placements = {"weight": 0, "bias": 0, "pos_embed": 2, "prefix_tokens": 2}
GRADIENTS = ("dweight", "dbias", "dpos_embed", "dprefix_tokens")


def patch_embed_fwd(**_) -> list[Split]:
    return [({"tokens": 0}, {"images": 0}), ({"tokens": 2}, CHANNELS)]


def patch_embed_bwd(**_) -> list[Split]:
    of_channels = {"dimages": SUM} | {f"d{name}": dim for name, dim in CHANNELS.items()}
    return [
        (dims(0, "dimages") | dims(SUM, *GRADIENTS), dims(0, "dtokens", "images")),
        (of_channels, {"dtokens": 2} | CHANNELS),
    ]
