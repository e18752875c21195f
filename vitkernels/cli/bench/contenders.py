"""The models that race: the same weights, one call for a forward and one for a training step."""

from __future__ import annotations

import copy
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import use_backend
from .. import naming
from ..timm_peer import fused_attention, import_timm

OURS = "vitkernels"
TIMM, TIMM_FUSED = "timm", "timm TIMM_FUSED_ATTN=2"
LR = 1e-4  # of AdamW; small, so that a thousand steps leave the numbers ordinary


@dataclasses.dataclass
class Contender:
    """A model, and the backend and precision it runs with."""

    name: str
    model: nn.Module
    backend: str
    autocast: torch.dtype | None = None
    optimizer: torch.optim.Optimizer | None = None

    @property
    def compiled(self) -> bool:
        return isinstance(self.model, torch._dynamo.OptimizedModule)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        with torch.inference_mode(), use_backend(self.backend):
            return self.model(x)

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        """With its gradients, which are added up in the parameters."""
        autocast = torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None)
        with use_backend(self.backend):
            with autocast:
                loss = F.cross_entropy(self.model(x), target)
            loss.backward()
        return loss.detach()

    def step(self, x: Tensor, target: Tensor) -> Tensor:
        """One training step, from the images to the new weights."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(x, target)
        self.optimizer.step()
        return loss

    def results(self, x: Tensor, target: Tensor, train: bool) -> dict[str, Tensor]:
        """What is compared: logits, or the loss and every gradient."""
        if not train:
            return {"logits": self.forward(x, target)}
        found = {"loss": self.loss(x, target)}
        found |= {
            name.removeprefix("_orig_mod."): parameter.grad
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }
        self.model.zero_grad(set_to_none=True)
        return found


@dataclasses.dataclass
class Sources:
    """The fp32 models that every contender is a copy of."""

    ours: nn.Module
    yardstick: nn.Module
    yardstick_name: str  # "timm", or "plain PyTorch" where timm is not installed
    yardstick_backend: str
    peers: dict[str, nn.Module] = dataclasses.field(default_factory=dict)  # more of them, by name

    @staticmethod
    def make(name: str, settings: dict, seed: int) -> Sources:
        naming.check_name(name)
        settings = {"drop_path_rate": 0.0, **settings}  # random: outputs could not be compared
        torch.manual_seed(seed)
        if import_timm() is None:
            ours = naming.make_model(name, **settings)
            return Sources(ours, copy.deepcopy(ours), "plain PyTorch", "torch")
        with fused_attention(1):
            theirs = naming.make_timm_model(name, **settings)
        ours = naming.from_timm_model(name, theirs)
        return Sources(ours, theirs, TIMM, "auto", _timm_fused(name, settings, theirs))

    def contenders(
        self, dtype: torch.dtype, train: bool, compiled: bool, backend: str, device: torch.device
    ) -> list[Contender]:
        """The yardstick first. 16-bit training is autocast over fp32 parameters."""
        autocast = dtype if train and dtype != torch.float32 else None
        of_weights = torch.float32 if train else dtype

        def contender(name, source, on, wrap=lambda model: model) -> Contender:
            model = copy.deepcopy(source).to(device, of_weights).train(train)
            made = Contender(name, wrap(model), on, autocast)
            if train:
                made.optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
            return made

        name, on = self.yardstick_name, self.yardstick_backend
        found = [
            contender(name, self.yardstick, on),
            contender(OURS, self.ours, backend),
            *(contender(peer, model, "auto") for peer, model in self.peers.items()),
        ]
        if compiled:
            wrap = torch.compile
            found.append(contender(f"torch.compile({name})", self.yardstick, on, wrap))
        return found

    def truth(self, train: bool, device: torch.device, x: Tensor, target: Tensor) -> dict:
        """The results in float64, of the fp32 weights."""
        on = "reference" if self.yardstick_backend == "torch" else "auto"
        model = copy.deepcopy(self.yardstick).to(device).double().train(train)
        return Contender("float64", model, on).results(x.double(), target, train)


def _timm_fused(name: str, settings: dict, theirs: nn.Module) -> dict[str, nn.Module]:
    """timm's model on SDPA with the same weights, where its switch makes a difference."""
    with fused_attention(2):
        fused = naming.make_timm_model(name, **settings)
    if _on_sdpa(fused) == _on_sdpa(theirs):
        return {}
    fused.load_state_dict(theirs.state_dict())
    return {TIMM_FUSED: fused}


def _on_sdpa(model: nn.Module) -> list[bool]:
    return [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")]
