"""DistributedDataParallel whose buckets depend on the module alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import _group, _loop


class _StableBuckets(DistributedDataParallel):
    """DistributedDataParallel that never regroups its buckets.

    DistributedDataParallel averages the first backward pass in buckets in the order of the
    parameters, and later ones in the order in which gradients became ready. From 3 ranks on, the
    last bits of a sum depend on the place within the bucket. A module that is wrapped again after a
    loss would begin with the first kind in the middle of a training, and give other bits than an
    undisturbed run. So here all passes use the buckets of the reverse order of the parameters, which
    is nearly that of the gradients.
    """

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__(module, **options)
        # As at the end of the first backward pass, with all gradients in the order of the parameters.
        self.reducer._push_all_rebuilt_params()
        self.reducer._rebuild_buckets()

    def forward(self, *inputs: Any, **options: Any) -> Any:
        # If the job hangs, the rank with the lowest count is named. A rank may wait for others in
        # the forward pass, which synchronizes buffers, and in the backward pass.
        is_step = self.training and torch.is_grad_enabled()
        if is_step:
            _loop.note_activity()
        output = super().forward(*inputs, **options)
        if is_step:
            _loop.note_activity()
            if (tensor := _first_with_gradient(output)) is not None:
                tensor.register_hook(_note_backward)
        return output

    def _build_params_for_reducer(self) -> tuple[list[torch.Tensor], list[bool]]:
        parameters, expect_sparse = super()._build_params_for_reducer()
        return list(reversed(parameters)), list(reversed(expect_sparse))


def _note_backward(_: torch.Tensor) -> None:
    _loop.note_activity()


def _first_with_gradient(output: Any) -> torch.Tensor | None:
    if isinstance(output, torch.Tensor):
        return output if output.requires_grad else None
    items = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return next((found for item in items if (found := _first_with_gradient(item)) is not None), None)


def parallel(module: nn.Module, **options: Any) -> DistributedDataParallel:
    """Wraps a module in DistributedDataParallel for the current round.

    Call it within the elastic function, which is entered again in each round. A wrapper of an
    earlier round must not be used. Gradients are averaged in buckets that are the same in each
    round, so that a disturbed training gives the bits of an undisturbed one.

    Args:
        module: the module, on the device of this rank, with at least one parameter that requires a
            gradient.
        **options: arguments of ``torch.nn.parallel.DistributedDataParallel``.

    Returns:
        The wrapper. Its ``module`` is the module.

    Raises:
        RuntimeError: there is no process group, because the call is outside of an elastic function.
    """
    if _loop.is_in_state(module):
        # All ranks have the same state at the beginning of a round.
        options.setdefault("init_sync", False)
    wrapper = _StableBuckets(module, **options)
    _group.watch(wrapper)
    return wrapper
