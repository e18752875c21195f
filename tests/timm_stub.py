"""timm beside a CPU-only torch.

torchvision's registry wheel is a CUDA build whose operators are missing there. Defining their names
first lets torchvision's Python code, and so timm, import and run.

    from timm_stub import timm          # None where timm is not installed
"""

import torch

_OPS = ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
_LIBRARY = None


def import_timm():
    """The timm module, or None where timm or torchvision is missing."""
    global _LIBRARY
    try:
        import timm

        return timm
    except ImportError:
        return None
    except RuntimeError:  # operator torchvision::nms does not exist
        if _LIBRARY is None:
            _LIBRARY = torch.library.Library("torchvision", "DEF")
            for op in _OPS:
                _LIBRARY.define(f"{op}(Tensor a) -> Tensor")
                _LIBRARY.define(f"_{op}_backward(Tensor a) -> Tensor")
        import timm

        return timm


timm = import_timm()
