from .op import BACKENDS, distillation_loss

__all__ = ["BACKENDS", "distillation_loss"]
