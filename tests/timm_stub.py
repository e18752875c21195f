"""timm, also beside a CPU-only torch, as the command line imports it.

from timm_stub import timm          # None where timm or torchvision is not installed
"""

from vitkernels.cli.timm_peer import import_timm
from vitkernels.cli.usage import UsageError

try:
    timm = import_timm()
except UsageError:
    timm = None
