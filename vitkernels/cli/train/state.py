"""A run's numbers in one form, however its parameters lie: full tensors by name, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .heads import packed, unpacked
from .parallel import World


class Layout:
    """Reads and writes tensors that belong to a model's parameters, whole or in shards."""

    def __init__(self, model: nn.Module, parallel: str, world: World):
        self.model, self.world = model, world
        self.split = parallel == "tp" and world.size > 1

    def full(self, name: str, value: Tensor) -> Tensor:
        """All processes call it together."""
        value = value.detach()
        value = (value.full_tensor() if isinstance(value, DTensor) else value).cpu()
        return unpacked(name, value, self._heads(name), self.world.size) if self.split else value

    @torch.no_grad()
    def put(self, name: str, target: Tensor, value: Tensor) -> None:
        """The full `value` into `target`, of which this process may hold a part."""
        if self.split:
            value = packed(name, value, self._heads(name), self.world.size)
        target.copy_(self._like(value, target))

    def placed(self, name: str, value: Tensor, like: Tensor) -> Tensor:
        """A new tensor that lies as `like` does; a number stays as it is."""
        if value.ndim == 0 and like.ndim != 0:
            return value.clone()
        made = torch.empty_like(like, dtype=value.dtype)
        self.put(name, made, value)
        return made

    def _like(self, value: Tensor, target: Tensor) -> Tensor:
        if not isinstance(target, DTensor):
            return value.to(target.device, target.dtype)
        value = value.to(target.device, target.dtype)
        # Every process has read the same file: nobody has to be sent anything.
        return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)

    def _heads(self, name: str) -> int:
        if ".attn.qkv." not in name:
            return 0
        return self.model.get_submodule(name.rsplit(".qkv.", 1)[0]).num_heads * self.world.size


def weights_of(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """A copy: later steps do not change it."""
    return {name: layout.full(name, value).clone() for name, value in model.state_dict().items()}


def load_weights(model: nn.Module, layout: Layout, weights: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        layout.put(name, value, weights[name])


def moments_of(optimizer, model: nn.Module, layout: Layout) -> dict[str, dict[str, Tensor]]:
    names = {p: name for name, p in model.named_parameters()}
    return {
        names[p]: {key: layout.full(names[p], value) for key, value in state.items()}
        for p, state in optimizer.state.items()
    }


def load_moments(optimizer, model: nn.Module, layout: Layout, moments: dict) -> None:
    for name, parameter in model.named_parameters():
        if name in moments:
            optimizer.state[parameter] = {
                key: layout.placed(name, value, parameter) for key, value in moments[name].items()
            }
