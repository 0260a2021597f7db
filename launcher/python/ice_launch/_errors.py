"""Exceptions of the package."""

from __future__ import annotations


class RoundOver(BaseException):
    """The round of this rank is over: a rank is lost, or nodes join or leave.

    `elastic` catches it and enters the function again in the next round. It is no subclass of
    `Exception`, so that a program's ``except Exception`` does not swallow it.
    """

    def __init__(self, reason: str, *, ended_by_others: bool = False) -> None:
        super().__init__(reason)
        # Whether another node ends the round, as all ranks have agreed.
        self.ended_by_others = ended_by_others


class NotFinite(FloatingPointError):
    """Gradients are infinite or NaN, and were not applied; see ``check_finite`` of `State`.

    The message names the ranks whose own gradients they are. All ranks raise it in the same step.
    """


class StateLost(RuntimeError):
    """No rank has a committed state to continue from, so the job has to be restarted.

    Every rank that is left was interrupted after its parameters had changed and before
    ``commit()``, by a collective between the two. Move that collective after ``commit()``, or pass
    ``copies=True`` to `State`.
    """
