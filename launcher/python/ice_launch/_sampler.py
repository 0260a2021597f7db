"""The order of the samples."""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter


class ElasticSampler(Sampler[list[int]]):
    """Batches of sample indices, each sample once per epoch, whatever happens to the ranks.

    One permutation per epoch and one position in it are the same on all ranks. Each step takes the
    next ``batch_size`` samples for each rank. If the number of ranks changes within an epoch, the
    rest of the permutation is divided among the ranks that are there.

    Pass it to a loader as ``batch_sampler``, and to `State`, whose ``commit()`` moves the position.
    Batches that worker processes have prefetched and that are not committed are drawn again::

        sampler = ElasticSampler(dataset, batch_size=32)
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=4)

    Args:
        data: the dataset, or its number of samples.
        batch_size: samples per rank and step.
        shuffle: whether to permute the samples in each epoch.
        seed: seed of the permutations, equal on all ranks.
        drop_last: whether to leave out the end of an epoch that does not fill the batches of all
            ranks. Otherwise the samples that are left are divided evenly. If fewer samples are left
            than there are ranks, some ranks repeat one of them, since each rank needs a batch.

    Raises:
        ValueError: ``batch_size`` is less than 1.
    """

    def __init__(
        self,
        data: Sized | int,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, and must be at least 1")
        self.samples = data if isinstance(data, int) else len(data)
        self.batch_size, self.shuffle, self.seed, self.drop_last = batch_size, shuffle, seed, drop_last
        self.epoch = 0
        # Number of samples of the epoch that committed steps have used, on all ranks together.
        self.position = 0
        # Positions after each batch that was drawn and not committed.
        self._drawn: deque[int] = deque()
        # Batches of the iteration that were committed, and the loader's iterator if its workers draw
        # ahead. It counts the batches that the program has received.
        self._counted = 0
        self._loader: weakref.ref[_MultiProcessingDataLoaderIter] | None = None
        # Whether the last iteration has drawn all batches of the epoch.
        self._exhausted = False
        # Set by the state: called before the first batch of an iteration, and after the last one.
        self._on_begin: Callable[[], None] = lambda: None
        self._on_end: Callable[[], None] = lambda: None

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch, or continues it if it is the current one.

        Raises:
            RuntimeError: batches of the last epoch were used and not committed, or the state has
                reached a later epoch.
        """
        if epoch == self.epoch:
            self._exhausted = False
            return
        if epoch < self.epoch:
            raise RuntimeError(f"the state has reached epoch {self.epoch}, so the loop over epochs cannot begin at {epoch}: begin at state.epoch")
        if self._exhausted and self._drawn:
            raise RuntimeError(
                f"{len(self._drawn)} batches of epoch {self.epoch} were not committed: "
                "call state.commit() after each batch, or state.commit(batches=n) after n of them"
            )
        self.epoch, self.position, self._exhausted = epoch, 0, False
        self._drawn.clear()

    def __len__(self) -> int:
        """Returns the number of batches of this rank that are left in the epoch."""
        _, ranks = _place()
        whole, rest = divmod(self.samples - self.position, ranks * self.batch_size)
        return whole + int(rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        """Draws the batches of this rank, from the committed position to the end of the epoch.

        Raises:
            RuntimeError: the epoch is complete, and ``set_epoch`` was not called.
        """
        # A loader calls this from a method of its iterator, and does not pass the iterator on.
        caller = sys._getframe(1).f_locals.get("self")
        draws_ahead = isinstance(caller, _MultiProcessingDataLoaderIter)
        return self._draw(weakref.ref(caller) if draws_ahead else None)

    def _draw(self, loader: weakref.ref[_MultiProcessingDataLoaderIter] | None) -> Iterator[list[int]]:
        if self._exhausted and self.position >= self.samples:
            raise RuntimeError(f"epoch {self.epoch} is complete: call sampler.set_epoch(epoch) before each epoch")
        self._on_begin()
        self._drawn.clear()
        self._exhausted = False
        self._counted, self._loader = 0, loader
        rank, ranks = _place()
        order, position = self._order(), self.position
        for _ in range(len(self)):
            left = self.samples - position
            taken = min(left, ranks * self.batch_size)
            first, end = _share(taken, rank, ranks)
            batch = order[position + first : position + end]
            position += taken
            self._drawn.append(position)
            yield batch.tolist()
        self._exhausted = True
        self._end_if_complete()

    def _end_if_complete(self) -> None:
        """Notes the end of the steps of an epoch. Workers of a loader draw the last batch long before
        its step."""
        if self._exhausted and not self._drawn:
            self._on_end()

    def _order(self) -> torch.Tensor:
        if not self.shuffle:
            return torch.arange(self.samples)
        # The seed of an epoch has nothing in common with that of the next one.
        mixed = _mix(_mix(self.seed) ^ self.epoch)
        return torch.randperm(self.samples, generator=torch.Generator().manual_seed(mixed))

    def _taken(self) -> int | None:
        """Returns the number of batches that the program has received and not committed; `None` if
        that is not known, because a loop over a loader with workers has ended early."""
        if self._loader is None or not self._drawn:
            return len(self._drawn)
        loader = self._loader()
        return None if loader is None else loader._num_yielded - self._counted

    def _commit(self, batches: int | None) -> int:
        """Moves the position over this number of batches; by default over one, if the program has
        received one. Returns the number."""
        taken = self._taken()
        if batches is None:
            if taken is None:
                raise ValueError(
                    "the loop over the loader has ended before the end of the epoch, and it is not known whether its "
                    "last batch was used since the last commit: call commit(batches=0), or commit(batches=1) if it was"
                )
            batches = min(1, taken)
        most = len(self._drawn) if taken is None else taken
        if batches > most:
            raise ValueError(f"commit(batches={batches}), but only {most} batches were drawn since the last commit")
        for _ in range(batches):
            self.position = self._drawn.popleft()
        self._counted += batches
        if batches:
            self._end_if_complete()
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Returns the committed place: ``epoch``, ``position`` and ``seed``."""
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Moves to a place from `state_dict`. The next iteration continues there."""
        self.epoch, self.position, self.seed = state["epoch"], state["position"], state["seed"]
        self._exhausted = False
        self._drawn.clear()


def _place() -> tuple[int, int]:
    """Returns the rank and the number of ranks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _share(samples: int, rank: int, ranks: int) -> tuple[int, int]:
    """Returns the part of a step's samples that belongs to a rank, as first index and end."""
    if samples < ranks:
        first = rank % samples
        return first, first + 1
    each, more = divmod(samples, ranks)
    first = rank * each + min(rank, more)
    return first, first + each + int(rank < more)


def _mix(number: int) -> int:
    """Returns 63 bits that depend on all bits of a number: one step of SplitMix64 (Steele et al., 2014)."""
    z = (number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) >> 1
