"""Replaces attributes of Lightning's objects and puts them back; no other file replaces a hook of theirs.

What is replaced stands in a table, kept by the object that it lasts as long as. The table of a Trainer (`of_run`) is
undone when its run ends. Lightning calls `Callback.teardown` after a run that has succeeded and no other, and
`Callback.on_exception` before `ModelCheckpoint` has saved what the exception interrupted. But it calls
`Strategy.teardown` after each run, whether it has succeeded, failed or been stopped from the keyboard, so the table is
undone there. Where Lightning itself fails before it comes to that, the next run begins with `Strategy.connect`, and so
with an empty table.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L

_ATTRIBUTE = "_lightning_peft_patches"


@dataclass
class _Change:
    owner: Any
    name: str
    lasting: bool
    undo: Callable[[], None]


@dataclass
class _Replaced:
    """Puts an earlier value back, unless another has taken the place of ours since."""

    owner: Any
    name: str
    value: Any
    earlier: tuple[Any, ...]

    def __call__(self) -> None:
        present = _present(self.owner, self.name)
        if present and present[0] is self.value:
            _put_back(self.owner, self.name, *self.earlier)


class Patches:
    """A table of all changes made to objects, in order, from which they can be undone.

    It pickles and deep-copies with the object that keeps it, if the new values do: give functions of a module, or
    `functools.partial` of them, not closures.
    """

    def __init__(self) -> None:
        self._changes: list[_Change] = []

    @classmethod
    def of(cls, holder: Any) -> "Patches":
        """Return the table that this object keeps; the first call makes it."""
        table: Patches = vars(holder).setdefault(_ATTRIBUTE, cls())
        return table

    def __len__(self) -> int:
        return len(self._changes)

    def patch(self, owner: Any, name: str, value: Any, lasting: bool = False) -> None:
        """Set an attribute and record its first value, which `undo` puts back.

        Args:
            owner: a strategy, a plugin, a module, a class, another part of a Trainer.
            name: the attribute, e.g. a hook.
            value: the new value; of a hook, a function without the owner as first argument.
            lasting: whether it stays when a run ends, until the Trainer begins another; see `of_run`.
        """
        known = self._find(owner, name)
        if known is not None and isinstance(known.undo, _Replaced):
            known.undo.value = value
        self.record(owner, name, _Replaced(owner, name, value, _present(owner, name)), lasting)
        setattr(owner, name, value)

    def record(self, owner: Any, name: str, undo: Callable[[], None], lasting: bool = False) -> None:
        """Record a function that undoes a change other than a replaced attribute."""
        if self._find(owner, name) is None:
            self._changes.append(_Change(owner, name, lasting, undo))

    def undo(self, owner: Any, name: str) -> None:
        """Undo one change, if it is in the table."""
        change = self._find(owner, name)
        if change is not None:
            self._changes = [other for other in self._changes if other is not change]
            change.undo()

    def restore(self, lasting: bool = True) -> None:
        """Undo all changes, the latest first, or those that do not last."""
        changes, self._changes = self._changes, [c for c in self._changes if c.lasting and not lasting]
        with ExitStack() as stack:  # one that fails keeps none of the others from being undone
            for change in changes:
                if lasting or not change.lasting:
                    stack.callback(change.undo)

    def _find(self, owner: Any, name: str) -> _Change | None:
        return next((change for change in self._changes if change.owner is owner and change.name == name), None)


def of_run(trainer: L.Trainer) -> Patches:
    """Return the table of a Trainer, which is undone when its run ends, however it ends.

    What ``trainer.save_checkpoint`` needs after a run is patched with ``lasting=True`` and stays until the next run.
    """
    table, strategy = Patches.of(trainer), trainer.strategy
    if table._find(strategy, "teardown") is None:
        table.patch(strategy, "teardown", partial(_end, trainer))
        table.patch(strategy, "connect", partial(_begin, trainer))
    return table


def restore(trainer: L.Trainer) -> None:
    """Undo all changes made to a Trainer."""
    Patches.of(trainer).restore()


def extend(table: Patches, module: L.LightningModule, name: str, function: Callable[..., Any]) -> None:
    """Replace a hook of a module by a function of the module, the instance's own hook or None, and the arguments.

    It is a `functools.partial`: the module still pickles and deep-copies, and Lightning sees that the hook is
    overridden (with `functools.wraps` it would not). A hook that the function extends already stays as it is.
    """
    hook = vars(module).get(name)
    if not isinstance(hook, partial) or hook.func is not function:
        table.patch(module, name, partial(function, module, hook))


def inherited(module: L.LightningModule, instance_hook: Callable[..., Any] | None, name: str) -> Callable[..., Any]:
    """Return the hook that a function given to `extend` extends."""
    return instance_hook or partial(getattr(type(module), name), module)


def once(owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Replace a hook by a function for one call; the hook is back when the function runs."""
    Patches.of(owner).patch(owner, name, partial(_once, owner, name, function))


@contextmanager
def patched(owner: Any, name: str, *value: Any) -> Iterator[Callable[[], None]]:
    """Set an attribute for a while, or, without a value, let that of the class show.

    Yields:
        A function that ends it early.
    """
    undo = partial(_put_back, owner, name, *_present(owner, name))
    try:
        _put_back(owner, name, *value)
        yield undo
    finally:
        undo()


def _end(trainer: L.Trainer) -> None:
    """Stands in for the strategy's ``teardown``, the last that Lightning does to it in a run."""
    table = Patches.of(trainer)
    table.undo(trainer.strategy, "teardown")
    try:
        trainer.strategy.teardown()
    finally:
        table.restore(lasting=False)
        if table:
            table.patch(trainer.strategy, "connect", partial(_begin, trainer), lasting=True)


def _begin(trainer: L.Trainer, model: L.LightningModule) -> None:
    """Stands in for the strategy's ``connect``, the first that Lightning does to it in a run."""
    restore(trainer)
    trainer.strategy.connect(model)


def _once(owner: Any, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    Patches.of(owner).undo(owner, name)
    return function(*args, **kwargs)


def _present(owner: Any, name: str) -> tuple[Any, ...]:
    """Return the value of an attribute that is the object's own, or () if it is its class's."""
    if isinstance(getattr(type(owner), name, None), property):
        return (getattr(owner, name),)
    return (vars(owner)[name],) if name in vars(owner) else ()


def _put_back(owner: Any, name: str, *value: Any) -> None:
    if value:
        setattr(owner, name, value[0])
    elif name in vars(owner):
        delattr(owner, name)
