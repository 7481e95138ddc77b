"""The graft: a small module, registered as a named child of a frozen host, that joins the host's computation by hooks.

A graft overrides the joints it needs, and nothing else of the host changes: not its class, not its parameter names,
not its place in the tree. So a checkpoint of the bare backbone still loads, ``copy.deepcopy`` and ``pickle`` work, and
so do ``torch.compile(fullgraph=True)``, DDP, FSDP2 and gradient checkpointing. Only this file touches hooks.

>>> import torch
>>> class Doubled(Graft):
...     def after(self, out, host, x):
...         return 2 * out
>>> host, x = nn.Linear(3, 3), torch.ones(1, 3)
>>> once = host(x)
>>> graft = attach(host, Doubled(), "doubled")
>>> bool((host(x) == 2 * once).all()), list(host.state_dict())
(True, ['weight', 'bias'])
>>> detach(host, "doubled")
>>> bool((host(x) == once).all())
True
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import takewhile
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_peft.core import computed_weights, generating, placement
from lightning_peft.core.errors import TuningError
from lightning_peft.core.hosts import check_takes_hooks
from lightning_peft.core.pipeline import forward_of
from lightning_peft.core.private_torch import Movable, note_last, output_hooks
from lightning_peft.core.switch import Switch

G = TypeVar("G", bound="Graft")
_Call = tuple[tuple[Any, ...], dict[str, Any]]
_owner_now: ContextVar[tuple[str, Switch | None]] = ContextVar("owner", default=("", None))


class Graft(Movable):
    """A module that joins the computation of its one host. Override the joints that it needs.

    Two more joints are ``generated(out)``, what ``generate`` of a model returns; and ``weight(w: Tensor, name: str) ->
    Tensor``: what the host reads, while it runs, in place of its parameter ``name``, one of `weights`; so do the joints
    ``after`` of all its grafts. It serves weights that are read without a call (``nn.MultiheadAttention``, stacked
    experts) and methods that change a weight. It is not declared, since a graft may have a parameter of that name.

    Hooks are bound methods of the graft, so a deep copy of the host calls the copy of the graft. They compute through
    the graft's own ``__call__``, so a sharding wrapper may treat the graft as a unit of its own. A graft keeps no
    tensor between two calls of its host.

    Its parameters and its buffers, with those of its children, belong to the delta; what can be computed anew is
    registered with ``persistent=False``. A module that belongs elsewhere is kept by `refer`.
    """

    weights: tuple[str, ...] = ()
    """The parameters that the joint `weight` sees, by their names below the host."""
    hides: tuple[str, ...] = ()
    """The parameters of its host that compute no more while it does."""
    owner: str = ""
    """The name under which a backbone's record has the method that attached it; '' where none did."""
    switch: Switch | None = None
    """What says whether its owner rests; None: it always computes."""
    splits: Mapping[int, Mapping[str, int]] = {}
    """How it is split between ranks, as its host is: dimension of the host's weight -> name of a tensor of the graft ->
    which dimension of it; its other tensors are whole. A host that is split along a dimension left out is refused."""
    columns: int = 0
    """How many keys and values its joint `key_value` adds."""
    merged: bool = False
    """Whether its effect is in the parameters of the host, so that its joints return what they get."""
    comes_first: bool = False
    """Whether what its joint `after` gets must be what the host alone has computed."""
    folds_ties: bool = False
    """Whether each module that shares a tied parameter has such a graft, so that all may be folded into it."""
    listens_only: bool = False
    """Whether it changes nothing of what its host computes."""

    def __init__(self) -> None:
        super().__init__()
        self._handles: list[RemovableHandle] = []
        self._leaves: RemovableHandle | None = None
        self._first_argument = ""
        self._device: Any = None

    def before(self, host: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the new first argument of the host, from its first argument ``x``."""
        raise NotImplementedError

    def after(self, out: Any, host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the new output of the host, from its output ``out``."""
        raise NotImplementedError

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Compute the host's output in place of its ``forward``, which may be called, or not."""
        raise NotImplementedError

    def key_value(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, H, S, d], of an attention of `join`, with P more columns on their left."""
        raise NotImplementedError

    def merge(self, host: nn.Module) -> float | None:
        """Put the effect into the parameters of the host for good; override it where parameters can take it in."""
        raise NotImplementedError

    def neutral(self, host: nn.Module, name: str) -> Tensor | None:
        """Return the value of one of its tensors at which it has no effect, where the effect is linear in it."""
        return None

    def refer(self, **modules: nn.Module | None) -> None:
        """Keep modules of elsewhere in the backbone as attributes: no children, so that each tensor has one name."""
        vars(self).update(modules)

    def forward(self, joint: str, *args: Any, **kwargs: Any) -> Any:
        """Run one joint; the hooks come through here so that hooks on the graft itself run too."""
        return getattr(self, joint)(*args, **kwargs)

    @property
    def rests(self) -> bool:
        """Whether its owner is muted, or waits for the call of its rows, so that it returns what it gets."""
        return self.switch is not None and (self.switch.groups is not None or self.owner in self.switch.off)

    def is_first(self, host: nn.Module) -> bool:
        """Tell whether this graft's hook is the first to see the host's output, those that rest left out."""
        for hook in output_hooks(host):
            if hook == self._on_output or not getattr(getattr(hook, "__self__", None), "rests", False):
                return hook == self._on_output
        return False

    def _on_input(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        if self.rests:
            return args, kwargs
        args, kwargs = self._first_by_position(args, kwargs)
        return (self("before", host, *args, **kwargs), *args[1:]), kwargs

    def _on_output(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        if self.rests:
            return out
        args, kwargs = self._first_by_position(args, kwargs)
        return self("after", out, host, *args, **kwargs)

    def _on_enter(self, host: nn.Module, args: tuple[Any, ...]) -> None:
        if self.rests:
            return
        # A tensor in the instance's own attributes hides the parameter of that name and leaves all names as they are.
        for name in self.weights:
            owner, leaf = _owner(host, name)
            vars(owner)[leaf] = self("weight", getattr(owner, leaf), name)

    def _on_leave(self, host: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        for name in self.weights:
            owner, leaf = _owner(host, name)
            vars(owner).pop(leaf, None)

    def _leave_last(self, host: nn.Module) -> None:
        if self._leaves is not None:
            self._leaves.remove()
        # Always, since a checkpointed forward pass ends by an exception when it is computed anew.
        self._leaves = host.register_forward_hook(self._on_leave, always_call=True)

    def _first_by_position(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        args, kwargs = (args, kwargs) if self._device is None else placement.moved(args, kwargs, self._device)
        if args or not self._first_argument:  # a host may take nothing, such as a table of positions
            return args, kwargs
        return (kwargs[self._first_argument],), {n: v for n, v in kwargs.items() if n != self._first_argument}

    def moving(self, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Move with the host but keep the dtype: ``.half()`` or bf16-true would round what was learnt."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return keep_dtype


class Grafted(NamedTuple, Generic[G]):
    """A graft with its place: ``path`` is the dotted name of ``host``, ``name`` that of the graft in it."""

    path: str
    host: nn.Module
    name: str
    graft: G

    @property
    def full_name(self) -> str:
        """The dotted name of the graft itself."""
        return f"{self.path}.{self.name}".lstrip(".")


def attach(host: nn.Module, graft: G, name: str) -> G:
    """Register ``graft`` as the child ``name`` of ``host``, in the host's mode, and join its computation (`owned_by`).

    Raises:
        TuningError: the host has something of that name, is compiled (and ignores hooks), or lacks a parameter.
    """
    if hasattr(host, name):
        raise TuningError(f"{type(host).__name__} already has an attribute {name!r}: detach it or take another name.")
    check_takes_hooks(host)
    for weight in graft.weights:
        computed_weights.check_is_parameter(host, weight, f"{type(graft).__name__} would change nothing")
    graft._first_argument = next(iter(inspect.signature(host.forward).parameters), "")
    graft.owner, graft.switch, graft._device = *_owner_now.get(), placement.execution_device(host)
    host.register_module(name, graft)
    graft.train(host.training)
    if overrides(graft, "before"):
        graft._handles.append(host.register_forward_pre_hook(graft._on_input, with_kwargs=True))
    if overrides(graft, "weight"):
        graft._handles.append(host.register_forward_pre_hook(graft._on_enter))
    _surround(host)
    if overrides(graft, "after"):
        graft._handles.append(host.register_forward_hook(graft._on_output, with_kwargs=True))
        note_last(host)
    for child in host.children():  # every `after` sees the weights that the host has run with
        if isinstance(child, Graft) and overrides(child, "weight"):
            child._leave_last(host)
    return graft


def detach(host: nn.Module, name: str) -> None:
    """Remove the graft ``name`` from ``host``, which then computes as it did before, bit for bit.

    Raises:
        TuningError: what the host has under that name is no graft.
    """
    graft = getattr(host, name, None)
    if not isinstance(graft, Graft):
        raise TuningError(
            f"{name!r} of {type(host).__name__} is no graft but {type(graft).__name__}: nothing to detach."
        )
    for handle in (*graft._handles, *filter(None, [graft._leaves])):
        handle.remove()
    graft._handles.clear()
    graft._leaves = None
    delattr(host, name)
    _surround(host)


@contextmanager
def owned_by(name: str, switch: Switch | None) -> Iterator[None]:
    """Make the method of this name the owner of every graft that is attached inside the context."""
    token = _owner_now.set((name, switch))
    try:
        yield
    finally:
        _owner_now.reset(token)


def grafts(root: nn.Module, owner: str | None = None) -> Iterator[Grafted[Graft]]:
    """Yield every graft below ``root`` with its place, or those of one owner."""
    for path, host in list(root.named_modules()):
        for name, child in list(host.named_children()):
            if isinstance(child, Graft) and owner in (None, child.owner):
                yield Grafted(path, host, name, child)


def graft_prefixes(root: nn.Module) -> tuple[str, ...]:
    """Return the name prefixes, each with a dot at its end, of all modules and tensors that lie in a graft."""
    return tuple(f"{place.full_name}." for place in grafts(root))


def _surround(host: nn.Module) -> None:
    """Let the host run through its grafts that override ``around``, or as it did if none is left."""
    generating.surround(host)
    inner = vars(host).pop("forward", None)
    if isinstance(inner, partial) and inner.func is _forward:
        inner = inner.args[1]
    children = [child for child in host.children() if isinstance(child, Graft)]
    if any(overrides(child, "around") for child in children) or (children and isinstance(host, nn.Sequential)):
        bare = inner or partial(type(host).forward, host)
        surrounded = partial(_forward, host, inner)
        # Callers read the names of the arguments; annotations may not pickle.
        parameters = [p.replace(annotation=p.empty) for p in inspect.signature(bare).parameters.values()]
        vars(surrounded)["__signature__"] = inspect.Signature(parameters)
        inner = surrounded
    if inner is not None:
        vars(host)["forward"] = inner


def _forward(host: nn.Module, inner: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """Run the forward pass of a host through its grafts, the latest outermost."""
    run = inner or forward_of(host, Graft)
    for child in host.children():
        if isinstance(child, Graft) and overrides(child, "around") and not child.rests:
            run = partial(child, "around", run, host)
    return run(*args, **kwargs)


def _owner(host: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return host.get_submodule(path), leaf


def overrides(graft: Graft, joint: str) -> bool:
    """Tell whether the graft overrides this joint."""
    own = takewhile(lambda kind: kind is not Graft, type(graft).__mro__)
    return any(joint in vars(kind) for kind in own)
