"""Agreement on the newest committed state, and its way to the ranks that lack it."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from . import _tree
from ._errors import StateLost

if TYPE_CHECKING:
    from ._state import State


def agree(state: State, was_interrupted: bool) -> int:
    """Gives all ranks the newest committed state. Collective.

    In the first round that is the state of rank 0. Later it is that of the rank with the most
    commits, and of the newest round among these, which all other ranks adopt.

    Args:
        state: the state of this rank, whose step in progress is undone.
        was_interrupted: whether this rank was in the middle of a step.

    Returns:
        The number of steps that this rank repeats: 1 if it was in the middle of a step that no
        other rank has committed, else 0.

    Raises:
        StateLost: all ranks that had a state were interrupted where it cannot be undone.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = torch.tensor([state._is_valid, state._commits, state._commit_round, was_interrupted], device="cpu")
    all_ranks = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(all_ranks, own)
    progress = [tuple(one.tolist()) for one in all_ranks]
    versions = [(commits, number) for _, commits, number, _ in progress]
    valid = [at for at, one in enumerate(progress) if one[0]]
    if valid:
        source = max(valid, key=lambda at: (versions[at], -at))
        lacking = [at for at in range(ranks) if at not in valid or versions[at] != versions[source]]
    elif any(interrupted for *_, interrupted in progress):
        raise StateLost(
            "every rank was interrupted between a change of its parameters and state.commit(), so no state is left "
            "to continue from: move the collective between the two after commit(), or use State(copies=True)"
        )
    else:
        source = 0
        lacking = list(range(1, ranks))
    repeats = was_interrupted and rank not in lacking
    if rank == source and lacking:
        _send(state, lacking)
    elif rank in lacking:
        _receive(state, source)
    state._commit_round = versions[source][1]
    state._undo.watch_modules(state)
    state._remember()
    state._is_valid = True
    return int(repeats)


def _send(state: State, to: list[int]) -> None:
    text, tensors = _tree.flatten(state.state_dict())
    encoded = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    parts = [torch.tensor([encoded.numel()], device="cpu"), encoded, *(_bytes(tensor.cpu()) for tensor in tensors if tensor.numel())]
    # Started together: gloo then waits once for all of them, and not once for each.
    works = [dist.isend(part, rank) for rank in to for part in parts]
    for work in works:
        work.wait()


def _receive(state: State, source: int) -> None:
    length = torch.empty(1, dtype=torch.int64, device="cpu")
    dist.recv(length, source)
    encoded = torch.empty(int(length), dtype=torch.uint8, device="cpu")
    dist.recv(encoded, source)
    text = ctypes.string_at(encoded.data_ptr(), encoded.numel()).decode()
    tensors = [torch.empty(shape, dtype=dtype, device="cpu") for dtype, shape in _tree.shapes(text)]
    works = [dist.irecv(_bytes(tensor), source) for tensor in tensors if tensor.numel()]
    for work in works:
        work.wait()
    # Loaded once it is whole: the source may be lost, too.
    state._load(_tree.unflatten(text, tensors))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the bytes of a tensor: a view if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
