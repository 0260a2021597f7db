"""The state of a training, and its commits."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from . import _loop, _tree
from ._finite import FiniteCheck
from ._sampler import ElasticSampler, _mix, _place

# Number of elements up to which a buffer is copied at each commit, changed or not.
_SMALL = 1 << 16
# Objects are loaded in this order: a scheduler after its optimizer.
_ORDER = (nn.Module, Optimizer, LRScheduler)


class State:
    """Everything that a training continues from.

    Values are attributes: ``State(model=model, epoch=0)`` has ``state.model`` and ``state.epoch``.
    Objects with ``state_dict`` and ``load_state_dict`` (modules, optimizers, schedulers, a
    ``GradScaler``, an averaged model) belong to the state as such. Other values may be numbers,
    strings, tensors on the CPU, and lists, tuples and dicts of them.

    The seeds of PyTorch, `random` and NumPy become functions of ``seed``, the rank and the number
    of commits, so that a repeated step draws the same numbers, and so does a rank that takes the
    place of a lost one.

    Args:
        seed: seed of the random numbers. Default: that of ``torch.manual_seed``, from rank 0.
        copies: whether to copy all tensors of the state at each commit, so that a rank can also
            undo a step whose ``optimizer.step()`` it has done. That is needed if a collective
            follows ``optimizer.step()`` before the commit. Default: only with several optimizers.
        check_finite: whether to check the gradients before each ``optimizer.step()``, which costs a
            pass over them and a wait for the device. If any is infinite or NaN, all ranks raise
            `NotFinite`, which names the ranks that it came from, and nothing is applied. Has no
            effect on steps that a ``GradScaler`` leaves out.
        **values: the values, by name.

    Raises:
        TypeError: a value cannot be part of a state.
        ValueError: a name is that of a method of `State`.
    """

    def __init__(
        self, *, seed: int | None = None, copies: bool | None = None, check_finite: bool = False, **values: Any
    ) -> None:
        wrong = [name for name in values if name.startswith("_") or hasattr(State, name)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} cannot be the name of a value: it begins with _ or is a method of State")
        objects = {name: value for name, value in values.items() if hasattr(value, "load_state_dict")}
        rank = {name: next((at for at, kind in enumerate(_ORDER) if isinstance(value, kind)), 3) for name, value in objects.items()}
        self._objects: dict[str, Any] = dict(sorted(objects.items(), key=lambda item: rank[item[0]]))
        self._names = [name for name in values if name not in objects]
        self.__dict__.update(values)
        self._seed = torch.initial_seed() if seed is None else seed
        self._commits = 0
        # Whether another rank could continue from this state: a round has begun with it.
        self._is_valid = False
        # Number of the round of the last commit: after a loss, ranks that were cut off may have
        # committed a step that the others have repeated without them.
        self._commit_round = 0
        # Whether an optimizer has made a step since the last commit.
        self._is_changed = False
        self._optimizers: list[Optimizer] = self._all(Optimizer)
        self._samplers = {name: value for name, value in self._objects.items() if isinstance(value, ElasticSampler)}
        # Objects whose state is neither in parameters nor in buffers.
        self._small = [name for name, value in self._objects.items() if not isinstance(value, (nn.Module, Optimizer))]
        for optimizer in self._optimizers:
            optimizer.register_step_post_hook(self._note_step)
        for sampler in self._samplers.values():
            sampler._on_begin, sampler._on_end = self._begin_epoch, _loop.end_steps
        self._finite = FiniteCheck(self) if check_finite else None
        self._copies = len(self._optimizers) > 1 if copies is None else copies
        self._undo = _Undo()
        _tree.flatten(self.state_dict())

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in self._names:
            known = "is an object of the state, which cannot be replaced" if name in self._objects else "is not part of the state: name it in State(...)"
            raise AttributeError(f"state.{name} {known}")
        super().__setattr__(name, value)

    @property
    def commits(self) -> int:
        """Number of committed steps since the beginning of the training."""
        return self._commits

    def commit(self, batches: int | Mapping[str, int] | None = None, *, loss: float | torch.Tensor | None = None) -> None:
        """Marks the end of a step, from which the training continues if a rank is lost.

        Call it on every rank at the same points, once ``optimizer.step()`` is done. It is also the
        moment at which the job saves, pauses, stops, and lets nodes in.

        Args:
            batches: batches of the sampler that the step has used, for example 4 if gradients of 4
                batches were accumulated. Default: 1, or 0 if the program has received none since
                the last commit. With several samplers, a number holds for each one that the step
                has used, and a mapping has a number for each sampler by its name in the state, for
                example ``{"images": 4, "texts": 2}``; those that it lacks were not used.
            loss: loss of the step for the launcher's progress line, which shows that of rank 0. A
                tensor is read about twice a second, which waits for its device.

        Raises:
            RoundOver: the round is over. The step counts. Let `elastic` catch it.
            ValueError: fewer batches were drawn than ``batches``, a name is not that of a sampler,
                or the number of batches is not known.
        """
        samples = self._commit_batches(batches)
        is_step = samples > 0 or self._is_changed
        self._commits += 1
        self._commit_round = _loop.current_round()
        self._remember()
        _loop.committed(self, samples if is_step else None, loss)
        self._set_seeds()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state with references to its tensors, for a checkpoint."""
        return {
            "objects": {name: value.state_dict() for name, value in self._objects.items()},
            "values": {name: getattr(self, name) for name in self._names},
            "commits": self._commits,
            "seed": self._seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a state from `state_dict`, with the same names.

        Raises:
            KeyError: a name is missing.
        """
        self._load(state)
        self._remember()

    def _load(self, state: dict[str, Any]) -> None:
        for name, value in self._objects.items():
            value.load_state_dict(_tree.copied(state["objects"][name]))
        self._clear_step()
        for name in self._names:
            setattr(self, name, state["values"][name])
        self._commits, self._seed = state["commits"], state["seed"]

    def _commit_batches(self, batches: int | Mapping[str, int] | None) -> int:
        """Returns the number of samples on all ranks."""
        if isinstance(batches, Mapping):
            if unknown := batches.keys() - self._samplers.keys():
                raise ValueError(f"commit(batches=...) names {unknown.pop()!r}, which is not a sampler of the state")
            counts: dict[str, int | None] = {name: batches.get(name, 0) for name in self._samplers}
        else:
            counts = dict.fromkeys(self._samplers, batches)
            if batches is not None and len(counts) > 1:
                counts = {name: batches if sampler._taken() != 0 else 0 for name, sampler in self._samplers.items()}
        samples = 0
        for name, count in counts.items():
            before = self._samplers[name].position
            try:
                self._samplers[name]._commit(count)
            except ValueError as error:
                if len(counts) == 1:
                    raise
                each = ", ".join(f'"{name}": n' for name in counts)
                raise ValueError(f"{name}: {error}; or give each sampler its number: commit(batches={{{each}}})") from None
            samples += self._samplers[name].position - before
        return samples

    def _all(self, kind: type) -> list[Any]:
        return [value for value in self._objects.values() if isinstance(value, kind)]

    def _note_step(self, *_: Any) -> None:
        self._is_changed = True

    def _begin_epoch(self) -> None:
        _loop.begin_steps()
        # A loader draws a number when it is iterated over. In an undisturbed run it does so at the
        # beginning of an epoch, after a loss also within it.
        self._set_seeds()

    def _set_seeds(self) -> None:
        rank, _ = _place()
        seed = _mix(_mix(_mix(self._seed) ^ rank) ^ self._commits)
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed(seed & 0xFFFFFFFF)

    def _remember(self) -> None:
        """Keeps what the current step may change before its `optimizer.step()`."""
        self._is_changed = False
        if self._finite is not None:
            self._finite.clear()
        self._undo.remember(self)

    def _clear_step(self) -> None:
        """Drops what a step leaves behind outside of the state: gradients, which the next step would
        add to if the program drops them after its commit, and the stage of a `GradScaler`."""
        if self._finite is not None:
            self._finite.clear()
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        for value in self._objects.values():
            if isinstance(value, nn.Module):
                value.zero_grad(set_to_none=True)
            elif isinstance(value, torch.amp.GradScaler):
                value._per_optimizer_states.clear()

    def _interrupted(self) -> bool:
        """Undoes the step in progress. Returns whether this rank can still continue from here."""
        if not self._is_valid:
            return False
        self._is_valid = self._undo.undo(self)
        return self._is_valid


class _Undo:
    """What it takes to return to the last commit.

    Parameters usually change in `optimizer.step()` only, and what follows it up to the commit is not
    undone unless there are copies. Parameters that have changed otherwise are noticed by their
    versions. Buffers, learning rates, schedulers, scalers and numbers may change at any time, and
    are small.
    """

    def __init__(self) -> None:
        self._objects: dict[str, Any] = {}
        self._values: dict[str, Any] = {}
        self._groups: list[list[dict[str, Any]]] = []
        self._parameters: list[torch.Tensor] = []
        self._parameter_versions: list[int] = []
        # Dicts of the modules and names in them: a program may put another tensor there.
        self._places: list[tuple[dict[str, Any], str]] = []
        # Buffers and their copies; `None` before the first copy. Batch norm changes its statistics
        # without a new version of their tensors (PyTorch 2.13), so the version counts for large
        # buffers only.
        self._buffers: list[torch.Tensor | None] | None = None
        self._small_buffers: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self._large_buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._versions: list[int] = []
        self._whole: dict[str, Any] | None = None

    def remember(self, state: State) -> None:
        if state._copies:
            self._whole = _tree.copied(state.state_dict())
        self._objects = {name: _tree.copied(state._objects[name].state_dict()) for name in state._small}
        self._values = {name: _tree.copied(getattr(state, name)) for name in state._names}
        self._groups = [[_without_parameters(group) for group in one.param_groups] for one in state._optimizers]
        self._parameter_versions = [parameter._version for parameter in self._parameters]
        if self._buffers is None or any(
            buffers[name] is not known for (buffers, name), known in zip(self._places, self._buffers)
        ):
            self._copy_buffers()
            return
        buffers, copies = self._small_buffers
        if buffers:
            torch._foreach_copy_(copies, buffers)
        for at, (buffer, copy) in enumerate(self._large_buffers):
            if buffer._version != self._versions[at]:
                copy.copy_(buffer)
                self._versions[at] = buffer._version

    def watch_modules(self, state: State) -> None:
        """Notes parameters and buffers of the modules, at the beginning of a round."""
        modules = [part for module in state._all(nn.Module) for part in module.modules()]
        self._parameters = [parameter for module in state._all(nn.Module) for parameter in module.parameters()]
        self._places = [(module._buffers, name) for module in modules for name in module._buffers]
        # The next `remember` copies them.
        self._buffers = None

    def _copy_buffers(self) -> None:
        self._buffers = [buffers[name] for buffers, name in self._places]
        known = [buffer for buffer in self._buffers if buffer is not None]
        small = [buffer for buffer in known if buffer.numel() <= _SMALL]
        self._small_buffers = (small, [buffer.detach().clone() for buffer in small])
        large = [buffer for buffer in known if buffer.numel() > _SMALL]
        self._large_buffers = [(buffer, buffer.detach().clone()) for buffer in large]
        self._versions = [buffer._version for buffer in large]

    def undo(self, state: State) -> bool:
        if self._whole is not None:
            self._restore_buffers()
            commits = state._commits
            state.load_state_dict(self._whole)
            return state._commits == commits
        versions = [parameter._version for parameter in self._parameters]
        if state._is_changed or versions != self._parameter_versions:
            return False
        self._restore_buffers()
        for optimizer, groups in zip(state._optimizers, self._groups):
            for group, saved in zip(optimizer.param_groups, groups):
                group.update(_tree.copied(saved))
        for name, saved in self._objects.items():
            state._objects[name].load_state_dict(_tree.copied(saved))
        state.__dict__.update(_tree.copied(self._values))
        return True

    def _restore_buffers(self) -> None:
        for (buffers, name), buffer in zip(self._places, self._buffers or []):
            buffers[name] = buffer
        with torch.no_grad():
            for buffer, copy in zip(*self._small_buffers):
                buffer.copy_(copy)
            for (buffer, copy), version in zip(self._large_buffers, self._versions):
                if buffer._version != version:
                    buffer.copy_(copy)


def _without_parameters(group: dict[str, Any]) -> dict[str, Any]:
    return {key: _tree.copied(value) for key, value in group.items() if key != "params"}
