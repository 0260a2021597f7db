"""Recovery in place for PyTorch scripts under ice-launch.

A rank is lost, the other ranks keep their processes and their state, and the training continues
after the last committed step::

    import ice_launch

    state = ice_launch.State(model=model, optimizer=optimizer, sampler=sampler, epoch=0)

    @ice_launch.elastic
    def train(state):
        model = ice_launch.parallel(state.model)
        for state.epoch in range(state.epoch, 10):
            state.sampler.set_epoch(state.epoch)
            for inputs, targets in loader:
                state.optimizer.zero_grad()
                loss_of(model(inputs), targets).backward()
                state.optimizer.step()
                state.commit()

    train(state)

Without ice-launch the same script runs as a single process, and under torchrun as a usual
distributed program. Importing this package does not import torch.

The page "Make your script elastic" of the documentation explains each step.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._checkpoint import load_checkpoint, save_checkpoint
    from ._errors import NotFinite, RoundOver, StateLost
    from ._loop import alone, elastic
    from ._parallel import parallel
    from ._sampler import ElasticSampler
    from ._state import State

__all__ = [
    "ElasticSampler",
    "NotFinite",
    "RoundOver",
    "State",
    "StateLost",
    "alone",
    "elastic",
    "load_checkpoint",
    "parallel",
    "save_checkpoint",
]

_MODULES = {
    "ElasticSampler": "_sampler",
    "NotFinite": "_errors",
    "RoundOver": "_errors",
    "State": "_state",
    "StateLost": "_errors",
    "alone": "_loop",
    "elastic": "_loop",
    "load_checkpoint": "_checkpoint",
    "parallel": "_parallel",
    "save_checkpoint": "_checkpoint",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: these modules import torch.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
