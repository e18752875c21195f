"""Building blocks of the models, with timm's arguments, attribute names and state_dict keys."""

from .attention import Attention
from .block import Block
from .classifier_head import ClassifierHead
from .drop_path import DropPath
from .encoder import Encoder
from .encoder_block import EncoderBlock
from .glu_mlp import GluMlp
from .layer_norm import LayerNorm
from .layer_scale import LayerScale
from .linear import Linear
from .mlp import GELUTanh, Mlp, QuickGELU
from .patch_dropout import PatchDropout
from .patch_embed import PatchEmbed
from .patch_merging import PatchMerging, PatchMergingV2
from .pending import Pending
from .res_post_block import ResPostBlock
from .self_attention import SelfAttention
from .swin_block import SwinBlock
from .swin_stage import SwinStage
from .swin_v2_block import SwinV2Block
from .window_attention import WindowAttention, WindowAttentionV2
from .windows import Windows

__all__ = [
    "Attention",
    "Block",
    "ClassifierHead",
    "DropPath",
    "Encoder",
    "EncoderBlock",
    "GELUTanh",
    "GluMlp",
    "LayerNorm",
    "LayerScale",
    "Linear",
    "Mlp",
    "PatchDropout",
    "PatchEmbed",
    "PatchMerging",
    "PatchMergingV2",
    "Pending",
    "QuickGELU",
    "ResPostBlock",
    "SelfAttention",
    "SwinBlock",
    "SwinStage",
    "SwinV2Block",
    "WindowAttention",
    "WindowAttentionV2",
    "Windows",
]
