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
    commits, which ranks in the middle of a step, and new ranks, adopt.

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
    own = torch.tensor([state._is_valid, state._commits, was_interrupted])
    all_ranks = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(all_ranks, own)
    progress = [tuple(one.tolist()) for one in all_ranks]
    valid = [(commits, -at) for at, (is_valid, commits, _) in enumerate(progress) if is_valid]
    if valid:
        newest, at = max(valid)
        source = -at
        lacking = [at for at, (is_valid, commits, _) in enumerate(progress) if not is_valid or commits < newest]
    elif any(interrupted for _, _, interrupted in progress):
        raise StateLost(
            "every rank was interrupted after optimizer.step() and before state.commit(), so no state is left "
            "to continue from: move the collective between the two after commit(), or use State(copies=True)"
        )
    else:
        source, newest = 0, progress[0][1]
        lacking = list(range(1, ranks))
    repeats = was_interrupted and rank not in lacking
    if rank == source and lacking:
        _send(state, lacking)
    elif rank in lacking:
        _receive(state, source)
    state._undo.watch_buffers(state)
    state._remember()
    state._is_valid = True
    return int(repeats)


def _send(state: State, to: list[int]) -> None:
    text, tensors = _tree.flatten(state.state_dict())
    encoded = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    parts = [torch.tensor([encoded.numel()]), encoded, *(_bytes(tensor.cpu()) for tensor in tensors if tensor.numel())]
    # Started together: gloo then waits once for all of them, and not once for each.
    works = [dist.isend(part, rank) for rank in to for part in parts]
    for work in works:
        work.wait()


def _receive(state: State, source: int) -> None:
    length = torch.empty(1, dtype=torch.int64)
    dist.recv(length, source)
    encoded = torch.empty(int(length), dtype=torch.uint8)
    dist.recv(encoded, source)
    text = ctypes.string_at(encoded.data_ptr(), encoded.numel()).decode()
    tensors = [torch.empty(shape, dtype=dtype) for dtype, shape in _tree.shapes(text)]
    works = [dist.irecv(_bytes(tensor), source) for tensor in tensors if tensor.numel()]
    for work in works:
        work.wait()
    # Loaded once it is whole: the source may be lost, too.
    state.load_state_dict(_tree.unflatten(text, tensors))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the bytes of a tensor: a view if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
