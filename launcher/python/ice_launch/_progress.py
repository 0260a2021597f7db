"""Progress of a training, for the lines of the launcher and the goodput of the job."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from ._link import Link
    from ._state import State

# Seconds between two reports. The launcher prints fewer of them, see --progress-interval.
_INTERVAL = 0.5


class Progress:
    """Time of the steps, and reports of rank 0."""

    def __init__(self, link: Link) -> None:
        self._link, self._is_main = link, dist.get_rank() == 0
        # When the step in progress began, and from when on the samples of the next report count.
        self._began = self._since = time.monotonic()
        # Samples on all ranks since then.
        self._samples = 0
        # The first step is reported, then one per interval and the last one of an epoch.
        self._is_first = True

    def begin_step(self) -> None:
        """Notes that a step begins."""
        self._began = time.monotonic()

    def end_step(self, state: State, samples: int, loss: Any) -> None:
        """Notes a step with its samples on all ranks. The loss is read only for a report: that waits
        for its device."""
        now = time.monotonic()
        self._link.applied(now - self._began)
        self._samples += samples
        if not self._is_main:
            return
        sampler = next(iter(state._samplers.values()), None)
        is_last = sampler is not None and not len(sampler)
        if now - self._since < _INTERVAL and not is_last and not self._is_first:
            return
        epoch, done, total = 0, state.commits, 0
        if sampler is not None:
            per_step = sampler.batch_size * dist.get_world_size()
            epoch, done = sampler.epoch + 1, -(-sampler.position // per_step)
            total = done + len(sampler)
        rate = self._samples / max(now - self._since, 1e-6)
        value = loss.detach() if isinstance(loss, torch.Tensor) else loss
        self._link.progress(epoch, done, total, rate, None if value is None else float(value))
        self._since, self._samples, self._is_first = now, 0, False
