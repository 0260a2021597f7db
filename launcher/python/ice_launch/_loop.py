"""The elastic function: entered again in each round."""

from __future__ import annotations

import atexit
import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, overload

from . import _link
from ._errors import NotFinite, RoundOver, StateLost

if TYPE_CHECKING:
    from ._progress import Progress
    from ._state import State

Function = TypeVar("Function", bound=Callable[..., Any])
# Called on every rank with the state. Returns the path of the checkpoint, for the agent's report.
Save = Callable[["State"], "str | os.PathLike[str] | None"]

# Seconds in which the agent of a lost rank announces the end of the round, after a collective failed.
_END_OF_ROUND = 1.0


class _Run:
    """The running elastic function."""

    def __init__(self, state: State, link: _link.Link | None, save: Save | None) -> None:
        self.state, self.link, self.save = state, link, save
        self.progress: Progress | None = None
        # Steps that the round repeats, until its first step is committed.
        self.repeats: int | None = None
        # Whether the last exception came from a commit, after its step was counted.
        self.is_between_steps = False
        # Number of the round.
        self.round = 0
        # Whether the steps of an epoch are done, and how many `alone` blocks are open.
        self.is_between_epochs, self.alone_blocks = False, 0
        # The last checkpoint that was reported, with its number of commits.
        self.saved: tuple[str, int] | None = None

    def tell_alone(self) -> None:
        if self.link is not None:
            self.link.set_alone(self.is_between_epochs or self.alone_blocks > 0)


_run: _Run | None = None


@overload
def elastic(function: Function) -> Function: ...
@overload
def elastic(*, save: Save | str | os.PathLike[str] | None = None) -> Callable[[Function], Function]: ...
def elastic(function: Any = None, *, save: Save | str | os.PathLike[str] | None = None) -> Any:
    """Makes a function elastic: if a rank is lost, or nodes join or leave, it is entered again.

    The first argument of the function is a `State`. All ranks enter with the same state, that of
    the last commit, and with a new process group: the default group of ``torch.distributed``, with
    backend gloo. Whatever belongs to one round has to be made in the function: wrappers from
    `parallel`, other groups, and everything that depends on the rank or the number of ranks.

    Without ice-launch the function is called once: under torchrun in the group of its environment,
    else in a group of one process. The same holds for jobs with ``--dist-backend nccl``, whose
    ranks are started again if one is lost.

    Args:
        function: the function. It returns once its work is done.
        save: folder for `save_checkpoint`, or a function that is called on every rank, with the
            state, and returns the path of a checkpoint or `None`. It is used when the job is to
            save a checkpoint: on request, before it stops, and before it is preempted.

    Returns:
        The function, which returns the result of its last call. It ends the process with exit code
        0 if the job stops before that.

    Raises:
        RuntimeError: it is called a second time in one process, or within an elastic function, or
            under an agent, the program has formed the default group itself.
        StateLost: no rank has a state to continue from.
        NotFinite: the state checks gradients, and they are not finite.
        TypeError: the first argument is not a `State`.
    """
    if function is None:
        return functools.partial(elastic, save=save)
    if isinstance(save, (str, os.PathLike)):
        from ._checkpoint import save_checkpoint

        save = functools.partial(save_checkpoint, folder=save)

    @functools.wraps(function)
    def call(state: State, *arguments: Any, **options: Any) -> Any:
        from ._state import State

        if not isinstance(state, State):
            raise TypeError(f"{function.__name__}() is elastic: its first argument must be a State, not {type(state).__name__}")
        return _perform(functools.partial(function, state, *arguments, **options), state, save)

    return call


@contextmanager
def alone() -> Iterator[None]:
    """Marks work of any length without other ranks, for example a download or an evaluation on rank
    0. The agent does not take the time for a hang."""
    _count_alone(1)
    try:
        yield
    finally:
        _count_alone(-1)


def current_round() -> int:
    """Returns the number of the round; 0 outside of an elastic function."""
    return 0 if _run is None else _run.round


def is_in_state(module: Any) -> bool:
    """Returns whether a module is a value of the state of the running function."""
    return _run is not None and any(module is value for value in _run.state._objects.values())


def note_activity() -> None:
    """Notes that this rank has reached the next point of a step. All ranks pass the same points; if
    the job hangs, the rank that has passed the fewest is named."""
    if _run is not None and _run.link is not None:
        _run.link.note_activity()


def begin_steps() -> None:
    """Notes that an iteration over the samples begins."""
    _set_between_epochs(False)
    if _run is not None and _run.progress is not None:
        _run.progress.begin_step()


def end_steps() -> None:
    """Notes that no step may follow for a while: after an epoch, programs evaluate and save."""
    _set_between_epochs(True)


def saved(path: str | os.PathLike[str], commits: int) -> None:
    """Reports a checkpoint that is whole on disk."""
    checkpoint = (os.fspath(path), commits)
    if _run is not None and _run.link is not None and _run.saved != checkpoint:
        _run.saved = checkpoint
        _run.link.checkpoint_saved(*checkpoint)


def warn(text: str) -> None:
    """Prints a line for people, in one write."""
    sys.stderr.write(f"ice_launch: {text}\n")


def _set_between_epochs(is_between: bool) -> None:
    if _run is not None:
        _run.is_between_epochs = is_between
        _run.tell_alone()


def _count_alone(change: int) -> None:
    if _run is not None:
        _run.alone_blocks += change
        _run.tell_alone()


def committed(state: State, samples: int | None, loss: Any) -> None:
    """Passes the step boundary after a commit.

    Args:
        state: the state.
        samples: samples of the step on all ranks; `None` if the commit followed other work.
        loss: loss of this rank, for the progress line.

    Raises:
        RoundOver: the round is over.
        SystemExit: the job stops here.
    """
    if _run is None or _run.link is None or _run.progress is None:
        return
    link, progress = _run.link, _run.progress
    if samples is not None:
        progress.end_step(state, samples, loss)
    link.advance(state.commits)
    if _run.repeats is not None:
        link.first_step(state.commits, _run.repeats)
        _run.repeats = None
    while True:
        action, saves = link.boundary()
        if action == "continue":
            progress.begin_step()
            return
        _run.is_between_steps = True
        if saves and _run.save is not None:
            path = _run.save(state)
            if path is not None:
                saved(path, state.commits)
        if action == "stop":
            raise SystemExit(0)
        if action == "leave":
            raise RoundOver("nodes leave the job", ended_by_others=True)
        if action in ("regroup", "broken"):
            raise RoundOver("another rank is lost, or nodes join" if action == "broken" else "nodes join or leave")
        _run.is_between_steps = False


def _perform(function: Callable[[], Any], state: State, save: Save | None) -> Any:
    global _run
    if _run is not None:
        raise RuntimeError("a program can call one elastic function, once: put further work into that function")
    keeps_rounds = os.environ.get("ICE_DIST_BACKEND", "gloo") == "gloo"
    link = _link.connect() if keeps_rounds else None
    _run = _Run(state, link, save)
    from . import _group

    _group.prepare()
    if link is None:
        return _perform_once(function, state)
    _leave_signals_to_agent()
    atexit.register(link.announce_exit)
    link.stay()
    link.begin_run()
    return _perform_rounds(function, state, link, _run)


def _perform_once(function: Callable[[], Any], state: State) -> Any:
    from . import _group, _transfer

    group = _group.plain()
    try:
        _transfer.agree(state, False)
        state._set_seeds()
        result = function()
    except BaseException:
        _group.keep_forever()
        raise
    if group is not None:
        group.close()
    return result


def _perform_rounds(function: Callable[[], Any], state: State, link: _link.Link, run: _Run) -> Any:
    import torch.distributed as dist

    from . import _group, _transfer
    from ._progress import Progress

    if dist.is_initialized():
        raise RuntimeError("the default process group exists: leave init_process_group to the elastic function")
    # A spare has no round yet.
    place = link.first_round() or link.next_round()
    was_interrupted = False
    while place is not None:
        os.environ.update(place.variables)
        group = None
        run.is_between_steps, run.round = False, place.number
        run.is_between_epochs, run.alone_blocks = False, 0
        try:
            group = _group.form(link, place)
            repeats = _transfer.agree(state, was_interrupted)
            was_interrupted = False
            run.repeats = repeats
            state._set_seeds()
            run.tell_alone()
            run.progress = Progress(link)
            link.begin()
            result = function()
            # If a rank is lost in the very last step, its replacement needs the others: no rank
            # ends before all are done.
            link.end()
            dist.barrier()
        except BaseException as error:
            over = _as_round_over(link, error)
            if over is None:
                # The traceback holds the frames of the function, and they hold the wrapper.
                _group.keep_forever()
                raise
            # The frames of the function hold its wrapper, which holds the group.
            traceback.clear_frames(error.__traceback__)
            # After a commit nothing is to be undone. The state of a rank that has not begun is not
            # its own.
            was_interrupted |= state._is_valid and not run.is_between_steps
        else:
            link.end_run()
            group.close()
            return result
        state._clear_step()
        if was_interrupted:
            state._interrupted()
        if group is not None:
            group.close()
        if over.ended_by_others:
            link.await_end()
        else:
            link.leave_round(str(over))
        del over
        place = link.next_round()
    raise SystemExit(0)


def _as_round_over(link: _link.Link, error: BaseException) -> RoundOver | None:
    """Returns why the round is over; `None` if the error is the program's own."""
    if isinstance(error, RoundOver):
        return error
    if not isinstance(error, Exception) or isinstance(error, (NotFinite, StateLost)):
        return None
    # Connections of gloo name their source file. If the notice of the end is not there yet, which
    # takes long if a node is lost, `leave_round` waits for it.
    if link.is_over() or (isinstance(error, RuntimeError) and "gloo/transport/" in str(error)):
        return RoundOver(f"a collective failed: {error}")
    # Other errors of collectives are RuntimeErrors as well, and may be the program's own.
    if isinstance(error, RuntimeError) and link.wait_for_end(_END_OF_ROUND):
        return RoundOver(f"a collective failed: {error}")
    return None


def _leave_signals_to_agent() -> None:
    """Leaves Ctrl-C to the agent, which receives it as well and has the ranks stop at a boundary."""
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:
        # Only the main thread may.
        warn("SIGINT stays as it is outside of the main thread")
