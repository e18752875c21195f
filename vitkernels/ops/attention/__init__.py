from .op import BACKENDS, attention, attention_qkvpacked
from .weights import attention_weights

__all__ = ["BACKENDS", "attention", "attention_qkvpacked", "attention_weights"]
