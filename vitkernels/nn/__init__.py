"""Building blocks of the models, with timm's arguments, attribute names and state_dict keys."""

from .attention import Attention
from .block import Block
from .bottleneck import Bottleneck
from .classifier_head import ClassifierHead
from .distillation_loss import DistillationLoss
from .drop_path import DropPath
from .encoder import Encoder
from .encoder_block import EncoderBlock
from .glu_mlp import GluMlp
from .group_norm import GroupNormAct
from .hybrid_embed import HybridEmbed
from .layer_norm import LayerNorm
from .layer_scale import LayerScale
from .linear import Linear
from .mlp import GELUTanh, Mlp, QuickGELU
from .patch_dropout import PatchDropout
from .patch_embed import PatchEmbed
from .patch_merging import PatchMerging, PatchMergingV2
from .pending import Pending
from .res_post_block import ResPostBlock
from .resnet_v2 import ResNetStem, ResNetV2
from .self_attention import SelfAttention
from .std_conv import StdConv2d
from .swin_block import SwinBlock
from .swin_stage import SwinStage
from .swin_v2_block import SwinV2Block
from .window_attention import WindowAttention, WindowAttentionV2
from .windows import Windows

__all__ = [
    "Attention",
    "Block",
    "Bottleneck",
    "ClassifierHead",
    "DistillationLoss",
    "DropPath",
    "Encoder",
    "EncoderBlock",
    "GELUTanh",
    "GluMlp",
    "GroupNormAct",
    "HybridEmbed",
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
    "ResNetStem",
    "ResNetV2",
    "ResPostBlock",
    "SelfAttention",
    "StdConv2d",
    "SwinBlock",
    "SwinStage",
    "SwinV2Block",
    "WindowAttention",
    "WindowAttentionV2",
    "Windows",
]
