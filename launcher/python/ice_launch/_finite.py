"""The check that gradients are finite before they are applied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from . import _group
from ._errors import NotFinite

if TYPE_CHECKING:
    from ._state import State


class FiniteCheck:
    """Ends the training before a step whose gradients are infinite or NaN, and names the ranks.

    An average of the ranks does not say whose gradients were wrong. Hooks of the parameters see the
    gradients of this rank, before DistributedDataParallel averages them.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        # Whether each gradient of this rank was finite, since the last commit.
        self._own: list[torch.Tensor] = []
        for optimizer in state._optimizers:
            for parameter in _parameters(optimizer):
                if parameter.requires_grad:
                    parameter.register_hook(self._note)
            optimizer.register_step_pre_hook(self._check)

    def clear(self) -> None:
        """Forgets the gradients so far."""
        self._own.clear()

    def _note(self, gradient: torch.Tensor) -> None:
        self._own.append(_is_finite(gradient))

    def _check(self, optimizer: Optimizer, *_: Any) -> None:
        gradients = [parameter.grad for parameter in _parameters(optimizer) if parameter.grad is not None]
        if _all([_is_finite(gradient) for gradient in gradients]):
            return
        whose = "of this process"
        # Averaged gradients are the same on all ranks, so all of them come here.
        if _group.has_wrappers() and dist.get_world_size() > 1:
            own = torch.tensor([_all(self._own)], dtype=torch.int32, device="cpu")
            everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
            dist.all_gather(everyone, own)
            ranks = [str(rank) for rank, finite in enumerate(everyone) if not finite]
            whose = f"of rank {' and '.join(ranks)}" if ranks else "averaged over all ranks"
        raise NotFinite(f"the gradients {whose} in step {self._state.commits + 1} are not finite, and were not applied")


def _parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _is_finite(gradient: torch.Tensor) -> torch.Tensor:
    values = gradient.detach()
    return torch.isfinite(values.coalesce().values() if values.is_sparse else values).all()


def _all(flags: list[torch.Tensor]) -> bool:
    # One wait for the device.
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())
