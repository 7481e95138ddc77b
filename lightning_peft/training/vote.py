"""Lets the ranks of a run agree without waiting for each other: each step reads what was asked in the step before."""

from typing import Any

import torch


class Vote:
    """Asks all ranks whether something is true in any of them. The answer comes a step later, and costs no GPU a wait.

    The ranks speak over gloo, from CPU to CPU, so a GPU has nothing to do with it.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._asked: tuple[Any, torch.Tensor] | None = None

    def begin(self) -> None:
        """Open the connection; every rank must call it."""
        self._asked = None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            size = torch.distributed.get_world_size()
            self._group = torch.distributed.new_group(backend="gloo") if size > 1 else None

    def ask(self, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag whether it was true in any rank a step ago; every rank must call it.

        In a run of one process, the flags are the answer. After a true answer the next call begins anew.
        """
        if self._group is None:
            return flags
        answer = self._read(len(flags))
        if not any(answer):
            held = torch.tensor(flags, dtype=torch.uint8)
            most = torch.distributed.ReduceOp.MAX
            self._asked = torch.distributed.all_reduce(held, most, group=self._group, async_op=True), held
        return answer

    def end(self) -> None:
        """Read what is on its way; every rank must call it."""
        self._read(0)
        self._group = None

    def _read(self, count: int) -> tuple[bool, ...]:
        asked, self._asked = self._asked, None
        if asked is None:
            return (False,) * count
        asked[0].wait()
        return tuple(bool(flag) for flag in asked[1])
