"""The default process group of a round."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from ._errors import RoundOver
from ._link import Link, Round

# Seconds between two looks at the link while a group is being formed.
_POLL = 0.005
_STORE_TIMEOUT = timedelta(seconds=60)

Result = TypeVar("Result")

# Wrappers that hold the current group.
_wrappers: list[weakref.ref[Any]] = []


def watch(wrapper: Any) -> None:
    """Notes a DistributedDataParallel object that holds the current group."""
    _wrappers.append(weakref.ref(wrapper))


def has_wrappers() -> bool:
    """Returns whether gradients are averaged in this round."""
    return any(reference() is not None for reference in _wrappers)


def prepare() -> None:
    """Imports what must not be imported while a group exists.

    The first optimizer or DistributedDataParallel imports ``torch._dynamo``, and with it
    ``torch.distributed.nn.functional``, whose default arguments keep the group that exists then for
    ever: its threads, connections and port (PyTorch 2.13).
    """
    import torch._dynamo  # noqa: F401
    import torch.distributed.nn.functional  # noqa: F401


def keep_forever() -> None:
    """Keeps the current group until the process ends, also while the interpreter is finalized.

    For a group that may otherwise be dropped by a wrapper; see `Group.close`.
    """
    if dist.is_initialized():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))


class Group:
    """The default group, until `close`."""

    def __init__(self) -> None:
        # Each init_process_group wraps the hook once more: the hook before, and the wrapped one.
        self._excepthook, self._wrapped = sys.excepthook, None

    def formed(self) -> Group:
        """Notes that the group exists."""
        self._wrapped = sys.excepthook
        return self

    def close(self) -> None:
        """Destroys the group and everything that may hold it.

        The order matters (PyTorch 2.13): if the wrapper is the last owner of a gloo group, it drops
        the group while it holds the interpreter's lock, and the group's destructor may wait for a
        thread that needs this lock. A reference from Python releases the lock first.
        """
        if has_wrappers():
            gc.collect()
        outlives = False
        for reference in _wrappers:
            if (wrapper := reference()) is not None:
                # Otherwise its hooks would average gradients of the next round's wrapper, too.
                wrapper._remove_autograd_hooks()
                outlives = True
        _wrappers.clear()
        if dist.is_initialized():
            if outlives:
                keep_forever()
            group = dist.group.WORLD
            dist.destroy_process_group()
            # A rank that `--preload` has forked keeps its groups.
            getattr(dist.distributed_c10d._update_default_pg, "kept", []).clear()
            del group
        if sys.excepthook is self._wrapped:
            sys.excepthook = self._excepthook


class _Interruptible(type):
    """Stands for gloo's class within `form`: the constructor runs in a thread.

    Only the constructor can wait for a lost rank without end. All that torch notes about a group
    happens in the thread of `form`, so a constructor that returns after the end of its round has
    nothing to change: its group is dropped by the thread that was abandoned.
    """

    gloo: type
    link: Link

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        return _until_round_ends(cls.link, lambda: cls.gloo(*arguments, **options))

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.gloo)


@contextmanager
def _interruptible_gloo(link: Link) -> Iterator[None]:
    gloo = dist.distributed_c10d.ProcessGroupGloo
    dist.distributed_c10d.ProcessGroupGloo = _Interruptible("ProcessGroupGloo", (), {"gloo": gloo, "link": link})
    try:
        yield
    finally:
        dist.distributed_c10d.ProcessGroupGloo = gloo


def _until_round_ends(link: Link, make: Callable[[], Result]) -> Result:
    """Calls a function in a thread, which is abandoned if the round ends.

    Raises:
        RoundOver: the round has ended meanwhile.
    """
    made: list[Result] = []
    failure: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            made.append(make())
        except BaseException as error:  # noqa: BLE001
            failure.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name="ice-form", daemon=True).start()
    while not done.wait(_POLL):
        if link.is_over():
            raise RoundOver("the round ended while its process group was being formed")
    if failure:
        raise failure[0]
    return made.pop()


def form(link: Link, place: Round) -> Group:
    """Forms the gloo group of a round.

    A rank may wait for a connection from a lost one, and gloo cannot be interrupted there. The
    connections are therefore made in a thread, which is abandoned if the round ends.

    Raises:
        RoundOver: the round has ended meanwhile, or the group cannot be formed.
    """
    if dist.is_initialized():
        # Left by a round that ended before its group was closed.
        Group().close()
    group = Group()
    link.begin_round(place)
    if link.is_over():
        raise RoundOver("the round was over before it began")
    # Groups are numbered, and the number is part of their keys. An attempt that was abandoned has
    # used one, which other ranks have not.
    dist.distributed_c10d._world.group_count = 0
    try:
        store = _until_round_ends(
            link,
            lambda: dist.TCPStore(
                place.store_host, place.store_port, is_master=False, wait_for_workers=False, timeout=_STORE_TIMEOUT
            ),
        )
        with _interruptible_gloo(link):
            dist.init_process_group(
                "gloo", store=dist.PrefixStore(place.prefix, store), rank=place.rank, world_size=place.world_size
            )
        group.formed()
        link.join(place)
    except BaseException as error:
        group.formed().close()
        if isinstance(error, ConnectionError):
            raise RoundOver(f"the store of the round is gone: {error}") from None
        if isinstance(error, Exception):
            raise RoundOver(f"cannot form the process group: {error}") from error
        raise
    return group


def plain() -> Group | None:
    """Forms a group without an agent that keeps rounds: that of the launcher's environment, or of
    this process alone. Returns `None` if the program has formed one itself."""
    if dist.is_initialized():
        return None
    group = Group()
    if "RANK" in os.environ:
        uses_nccl = os.environ.get("ICE_DIST_BACKEND") == "nccl"
        # States travel over gloo.
        dist.init_process_group("cpu:gloo,cuda:nccl" if uses_nccl else "gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return group.formed()
