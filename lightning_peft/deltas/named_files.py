"""The tensors and the metadata of one delta of a file, under another name of the delta."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_peft.core.delta_file import MATCHED
from lightning_peft.core.errors import TuningError
from lightning_peft.core.name_lists import Entry
from lightning_peft.core.run import canonical
from lightning_peft.core.stand_in import stand_ins
from lightning_peft.core.tuning import Tuning

_NAMES = 1 << 14
"""How many names of tensors are remembered, since a delta that is swapped for others has them again and again."""


class Content(NamedTuple):
    """What a delta file holds of one delta.

    Attributes:
        tensors: by name.
        meta: of the file, with the methods of this delta alone.
        changed: names of the tensors of the backbone of which the deltas of the file have values of their own.
    """

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    changed: frozenset[str]

    @property
    def start(self) -> str:
        """What the names of tensors of its one backbone begin with."""
        path = next(iter(self.meta["backbones"]))
        return f"{path}." if path else ""


def content_of(tensors: Mapping[str, Tensor], meta: Mapping[str, Any], name: str, source: str) -> Content:
    """Return the delta of a file that is to go by ``name``: its one delta, or that of several which has the name.

    Raises:
        TuningError: none of several deltas has the name, or they are of several backbones.
    """
    if len(meta["backbones"]) != 1:
        raise TuningError(
            f"{source} is of {len(meta['backbones'])} backbones, of which a name says none: apply its methods and load "
            "it without name=."
        )
    held = dict.fromkeys(_delta(entry) for entry in meta["methods"])
    if len(held) > 1 and name not in held:
        raise TuningError(f"{source} holds the deltas {', '.join(held)}, but none of the name {name!r}: name one.")
    entries = [entry for entry in meta["methods"] if len(held) == 1 or _delta(entry) == name]
    every, own = tuple(_key(entry) for entry in meta["methods"]), {_key(entry) for entry in entries}
    content = Content(dict(tensors), {**meta, "methods": entries}, frozenset())
    below = {n.removeprefix(content.start) for n in tensors if n.startswith(content.start)}
    content = content._replace(changed=frozenset(filter(None, (_of_the_base(name, every) for name in below))))
    if len(held) == 1:
        return content
    in_place = None if any(entry["init_args"].get("name") is None for entry in entries) else ""
    wanted = {*own, in_place}
    chosen = {content.start + name for name in below if _key_in(name, every) in wanted}
    return content._replace(tensors={name: tensor for name, tensor in tensors.items() if name in chosen})


def renamed(content: Content, name: str) -> Content:
    """Return a delta as if it had been made under this name, its tensors in place still by the names of the base."""
    keys = {_key(entry): _key(entry, name) for entry in content.meta["methods"]}
    pairs = tuple(keys.items())
    tensors = {_renamed(tensor, pairs, content.start): value for tensor, value in content.tensors.items()}
    entries = [_with_name(entry, name, keys) for entry in content.meta["methods"]]
    return content._replace(tensors=tensors, meta={**content.meta, "methods": entries})


def with_stand_ins(content: Content, backbone: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the tensors, those of the base by the names of what stands in for them in a backbone with the delta."""
    tuning = Tuning.of(backbone)
    assert tuning is not None
    copies: dict[str, str] = {}
    for key in tuning.of_delta(name):
        for own, base in stand_ins(backbone, key).items():
            copies.setdefault(content.start + canonical(base), content.start + canonical(own))
    return {copies.get(tensor, tensor): value for tensor, value in content.tensors.items()}


def without_name(
    tensors: Mapping[str, Tensor], meta: Mapping[str, Any], backbone: nn.Module, name: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the delta of this name on a backbone, its tensors and metadata, as if it had none."""
    tuning = Tuning.of(backbone)
    assert tuning is not None
    keys = tuning.of_delta(name)
    base = {own: first for key in keys for own, first in stand_ins(backbone, key).items()}
    plain = {key: type(tuning.methods[key]).__name__.lower() for key in keys}
    entries = [_with_name(entry, None, plain) for entry in meta["methods"]]
    pairs = tuple(plain.items())
    named = {base.get(tensor) or _renamed(tensor, pairs, ""): value for tensor, value in tensors.items()}
    return named, {**meta, "methods": entries}


def _with_name(entry: Mapping[str, Any], name: str | None, keys: Mapping[str, str]) -> dict[str, Any]:
    """Return what a file says of a method under another name; its patterns may have matched names of grafts."""
    found = {argument: [_entry(e, keys) for e in names] for argument, names in entry.get(MATCHED, {}).items()}
    given = {"init_args": {**entry["init_args"], "name": name}}
    return {**entry, **given, **({MATCHED: found} if found else {})}


def _entry(entry: Entry, keys: Mapping[str, str]) -> Entry:
    if isinstance(entry, str):
        return _renamed(entry, tuple(keys.items()), "")
    return [part if i % 2 else _renamed(part, tuple(keys.items()), "") for i, part in enumerate(entry)]


@lru_cache(_NAMES)
def _renamed(tensor: str, pairs: tuple[tuple[str, str], ...], start: str) -> str:
    keys = dict(pairs)
    old = _key_in(tensor.removeprefix(start), tuple(keys)) if tensor.startswith(start) else None
    if old is None:
        return tensor
    parts = tensor.removeprefix(start).split(".")
    return start + ".".join(keys[old] + p.removeprefix(old) if _key_in(p, (old,)) else p for p in parts)


@lru_cache(_NAMES)
def _of_the_base(tensor: str, keys: tuple[str, ...]) -> str | None:
    """Return the name that a tensor of a file has in the base; None: it was added."""
    key = _key_in(tensor, keys)
    if key is None:
        return tensor
    host, found, leaf = f".{tensor}".rpartition(f".{key}_own.values.")
    return f"{host}.{leaf}".lstrip(".") if found else None


def _key_in(tensor: str, keys: tuple[str, ...]) -> str | None:
    """Return which of the methods, the one of the longest key, a tensor is of by its name; None: of none."""
    parts = tensor.split(".")
    found = [key for key in keys if any(part == key or part.startswith(f"{key}_") for part in parts)]
    return max(found, key=len, default=None)


def _kind(entry: Mapping[str, Any]) -> str:
    return str(entry["class_path"].rpartition(".")[2].lower())


def _delta(entry: Mapping[str, Any]) -> str:
    return str(entry["init_args"].get("name") or _kind(entry))


def _key(entry: Mapping[str, Any], name: str | None = None) -> str:
    name = name or entry["init_args"].get("name")
    return _kind(entry) if name is None else f"{_kind(entry)}_{name}"
