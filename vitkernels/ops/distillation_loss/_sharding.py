"""How distillation_loss runs on DTensors: whole, since the mean over the batch is in the gradients
that the forward makes; these are scaled by rows."""

from ..._sharding import Split, dims


def distillation_loss_fwd(**_) -> list[Split]:
    return []


def distillation_loss_bwd(**_) -> list[Split]:
    return [(dims(0, "dlogits", "ddistill"), dims(0, "dlogits", "ddistill"))]
