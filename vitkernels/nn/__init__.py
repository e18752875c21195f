"""Building blocks of the models, with timm's arguments, attribute names and state_dict keys."""

from .attention import Attention
from .block import Block
from .drop_path import DropPath
from .glu_mlp import GluMlp
from .layer_norm import LayerNorm
from .layer_scale import LayerScale
from .linear import Linear
from .mlp import GELUTanh, Mlp, QuickGELU
from .patch_dropout import PatchDropout
from .patch_embed import PatchEmbed
from .pending import Pending
from .res_post_block import ResPostBlock

__all__ = [
    "Attention",
    "Block",
    "DropPath",
    "GELUTanh",
    "GluMlp",
    "LayerNorm",
    "LayerScale",
    "Linear",
    "Mlp",
    "PatchDropout",
    "PatchEmbed",
    "Pending",
    "QuickGELU",
    "ResPostBlock",
]
