"""Trained rows of the word table: ``trainable_tokens_delta`` [n, d], alone or beside a LoRA.

PEFT trains the tied twins of the table, and a layer of scores tied to it, by the same rows, as it is here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.errors import TuningError
from lightning_peft.interop.adapter import PeftAdapter
from lightning_peft.interop.converters.base import Converter, Exported, Parts, delta_name, graft_tensors, places
from lightning_peft.interop.names import PREFIX, Names, selection

PART = "trainable_tokens_delta"
BESIDE = f"token_adapter.{PART}"
"""What the rows are called beside a LoRA."""
KEY = "trainable_token_indices"


class Words(NamedTuple):
    """Words that are trained: their ids, ascending, and their rows [n, d]."""

    ids: list[int]
    rows: Tensor


class TokensConverter(Converter):
    """The rows of the words."""

    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"
    methods: ClassVar[tuple[str, ...]] = ("TrainableTokens",)
    defaults: ClassVar[Mapping[str, Any]] = {"init_weights": True, "target_modules": None, "token_indices": []}
    without: ClassVar[frozenset[str]] = frozenset({"modules_to_save"})

    def export(self, model: nn.Module, method: Any, names: Names) -> Exported:
        """Return the rows, which PEFT has by the names of all tied layers."""
        table, rows, delta = _exported(model, method, names)
        config = {"token_indices": list(method.tokens), "target_modules": selection([table], names.modules)}
        return Exported(config, {place.path: {PART: rows} for place in places(model, method)}, delta=delta)

    def arguments(self, parts: Parts, names: Names) -> dict[str, Any]:
        """Return the ids of the words, in whose order their rows are put."""
        found = {path: tensors[PART] for path, tensors in parts.layers.items() if tensors.keys() == {PART}}
        if len(found) < len(parts.layers):
            raise TuningError(f"{parts.source} has other tensors than {PART}: take another copy of the adapter.")
        words = _words(found, [parts.config["token_indices"]], names, parts.source)
        parts.layers = {_table(names): {PART: words.rows}}
        return {"tokens": words.ids}

    def fill(self, parts: Parts, model: nn.Module, method: Any) -> dict[str, Tensor]:
        """Return the rows by their name in the delta."""
        ((_, tensors),) = parts.layers.items()
        return filled(Words(method.tokens, tensors[PART]), model, method)


def export_beside(exported: Exported, model: nn.Module, method: Any, names: Names) -> None:
    """Add the words that a method trains to an exported LoRA.

    Raises:
        TuningError: PEFT would train others, or cannot.
    """
    table, rows, delta = _exported(model, method, names)
    other = next((path for path in names.paths if path.endswith(table) and path != table), None)
    if other is not None or table in exported.layers:
        why = "has a low-rank update, too" if other is None else f"has a name that ends that of {other}, too"
        raise TuningError(f"PEFT cannot train rows of {table} beside this LoRA, since it {why}: keep the delta.")
    exported.config[KEY] = {table: list(method.tokens)}
    exported.layers[table] = {BESIDE: rows}
    exported.delta |= delta


def split(adapter: PeftAdapter, names: Names) -> tuple[PeftAdapter, Words | None]:
    """Return a LoRA without the words that it trains, and these.

    Raises:
        TuningError: it is not whole, or trains rows of another table.
    """
    ends = f".{BESIDE}"
    tensors = {key: tensor for key, tensor in adapter.tensors.items() if not key.endswith(ends)}
    indices = adapter.config.get(KEY)
    if len(tensors) == len(adapter.tensors) and not indices:
        return adapter, None
    found = {}
    for key in adapter.tensors.keys() - tensors.keys():
        name = key.removeprefix(PREFIX)
        place = names.locate(name)
        found[name.removesuffix(ends) if place is None else place[0]] = adapter.tensors[key]
    every = list(indices.values()) if isinstance(indices, dict) else [indices or []]
    words = _words(found, every, names, adapter.source)
    return replace(adapter, tensors=tensors, config=adapter.config | {KEY: None}), words


def filled(words: Words, model: nn.Module, method: Any) -> dict[str, Tensor]:
    """Return the rows by their name in the delta of a model, which has them once."""
    return {delta_name(places(model, method)[0], "rows"): words.rows}


def _exported(model: nn.Module, method: Any, names: Names) -> tuple[str, Tensor, set[str]]:
    """Return the name of the table, the rows in the order of the ids, and the names of their tensors in the delta."""
    found = places(model, method)
    return _table(names), found[0].graft.get_parameter("rows"), set().union(*map(graft_tensors, found))


def _words(found: dict[str, Tensor], indices: Sequence[list[int]], names: Names, source: str) -> Words:
    """Return the words whose rows an adapter has by the names of tables.

    Raises:
        TuningError: they are not those of the one word table.
    """
    table, ids = _table(names), indices[0]
    tied = {path for path, module in names.paths.items() if _weight(module) is _weight(names.modules[table])}
    odd = min(found.keys() - tied, default=None)
    if odd is not None:
        raise TuningError(
            f"{source} trains rows of {odd}, and TrainableTokens those of the word table, {table}, and of what is tied "
            "to it: merge it with PEFT."
        )
    shape = [len(ids), _weight(names.modules[table]).shape[1]]
    wrong = table not in found or any(list(rows.shape) != shape for rows in found.values())
    if wrong or any(other != ids for other in indices):
        raise TuningError(
            f"{source} has rows of {', '.join(found) or 'no table'} and names {list(indices)} as their words, which is "
            f"to be {shape} numbers of {table} and one list: take another copy, or merge it with PEFT."
        )
    if any(not torch.equal(rows, found[table]) for rows in found.values()):
        raise TuningError(f"{source} has other rows of one word in tables that are tied here: merge it with PEFT.")
    order = sorted(range(len(ids)), key=ids.__getitem__)
    return Words([ids[i] for i in order], found[table][order])


def _weight(module: nn.Module) -> Any:
    return dict(module.named_parameters(recurse=False)).get("weight")


def _table(names: Names) -> str:
    """Return the name of the word table, after seeing that PEFT ties to it what is tied to it here.

    Raises:
        TuningError: it does not.
    """
    tables = structure.word_tables(names.model)
    table = structure.input_embeddings_of(names.model)
    path = next(name for name, module in tables.items() if module is table)
    scores = structure.output_embeddings_of(names.model)
    tied = scores is not None and _weight(scores) is _weight(tables[path])
    if tied and dict(scores.named_parameters(recurse=False)).get("bias") is not None:  # type: ignore[union-attr]
        raise TuningError(
            f"PEFT leaves out the bias of the scores of {type(names.model).__name__}, which are tied to the word "
            "table, where rows of it are trained: keep the delta, or merge."
        )
    says = structure.setting(structure.config_of(names.model), "tie_word_embeddings")
    if (tied or len(tables) > 1) and says is not True:
        raise TuningError(
            f"{path} shares its rows with other layers, and tie_word_embeddings={says} in the configuration of "
            f"{type(names.model).__name__}, by which PEFT goes: set it, or untie them."
        )
    return path
