"""Soft prompts as words: token id ``-1 - k`` is virtual token k.

A graft on the table of word embeddings gives virtual ids their trained rows; the batch gets the ids, and mask, token
types, labels and positions of the same length. So a prompt at the front, tokens anywhere in a template, other prompts
per row and ``generate`` are one thing, and every head sees a sequence that is simply longer. The ids are negative since
CLIP pools at ``input_ids.argmax()`` and ids inside the vocabulary would collide with words.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft
from lightning_peft.core.host_copy import ask
from lightning_peft.core.labels import IGNORED
from lightning_peft.core.placement import device_of
from lightning_peft.prompting.languages import UNSPACED

SOURCE = "source_mask"
"""The entry of a batch, and argument of a prefix language model, that says which tokens are source, [B, T]."""
_OWN_WAY = ("input_ids", "attention_mask", "position_ids", "labels", SOURCE)
_ELSEWHERE = re.compile(r"(decoder|pixel|image|video|entity|cross)_.*|.*label.*|.*grid.*")
"""Names of tensors of integers that do not run along ``input_ids``, even where they have its shape."""
_SPANS = ("start_positions", "end_positions")
_OF_ROWS = ("task_ids",)
"""What all texts of a row have in common."""


class PromptRows(Graft):
    """Holds the rows of a soft prompt.

    Args:
        weight: the rows, [P, d], shared between the tied tables of a model; or a module that computes them.
    """

    encoder: nn.Module | None

    def __init__(self, weight: nn.Parameter | nn.Module) -> None:
        super().__init__()
        self.refer(encoder=weight if isinstance(weight, nn.Module) else None)
        if isinstance(weight, nn.Parameter):
            self.weight = weight

    def rows(self) -> Tensor:
        """Return the rows of virtual tokens 0, 1 ..., [P, d]."""
        return self.weight if self.encoder is None else self.encoder()

    def keep(self, weight: nn.Parameter) -> None:
        """Keep rows in place of the module that computed them."""
        self.encoder, self.weight = None, weight


class VirtualTokens(PromptRows):
    """Gives virtual ids their rows in the output of a word table."""

    def __init__(self, weight: nn.Parameter | nn.Module) -> None:
        super().__init__(weight)
        self._ids: Tensor | None = None

    def before(self, host: nn.Module, x: Tensor) -> Tensor:
        """Return ids that the table has: 0 in place of virtual ones, [B, T]."""
        self._ids = x
        return x.clamp(min=0)

    def after(self, out: Any, host: nn.Module, x: Tensor) -> Any:
        """Return the embeddings with the rows of virtual ids filled in, [B, T, d].

        Raises:
            TuningError: the table is quantised (I-BERT gives a scale along with its embeddings).
        """
        if isinstance(out, tuple):
            if out[1] is not None:
                raise TuningError(
                    f"{type(host).__name__} gives quantised embeddings, among which the rows of a prompt have no "
                    "place: train the prompt with quant_mode=False."
                )
            return (self.after(out[0], host, x), *out[1:])
        ids, self._ids = self._ids, None
        assert ids is not None
        rows = F.embedding((-1 - ids).clamp(min=0), self.rows()).to(out.dtype)
        return torch.where((ids < 0).unsqueeze(-1), rows, out)


class OtherTable(Graft):
    """Gives virtual ids, in a further table of words, the row of padding, as tokens of images have it."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def before(self, host: nn.Module, x: Tensor) -> Tensor:
        """Return ids that the table has, [B, T]."""
        return torch.where(x < 0, self.padding, x)


class PlainIds(Graft):
    """Takes the virtual ids out of what ``generate`` returns. Its host is the model."""

    def generated(self, out: Any) -> Any:
        """Return the ids without virtual ones, [B, T], or the output that holds them."""
        ids: Tensor = out if isinstance(out, Tensor) else out.sequences
        if not bool((ids < 0).any()):
            return out
        ids = ids[ids >= 0].view(len(ids), -1)  # each row has as many virtual tokens
        if isinstance(out, Tensor):
            return ids
        out.sequences = ids
        return out


def insert(
    batch: Mapping[str, Any], count: int, after: Tensor | int, targets: bool = False, first: Tensor | int = 0
) -> dict[str, Any]:
    """Return a copy of a batch with P virtual tokens put into each row, ``after`` real tokens from the row's first one.

    Every tensor of integers or truths that runs along ``input_ids``, [B, T] or [B, T, ...], becomes [B, P + T, ...]:
    types of tokens, boxes of words, masks. It holds 0 for virtual tokens, ``labels`` -100. Padding on the left
    stays on the left of the prompt. Labels of the rows ([B]) stay; ``start_positions`` and ``end_positions`` move with
    the text.

    Args:
        batch: holds ``input_ids`` and what goes with them.
        count: how many virtual tokens, P.
        after: 0 puts them before the first real token, 1 after it ([CLS]); or a number for each row, [B, 1].
        targets: ``labels`` are what a decoder shall write, which has no prompt, whatever their length.
        first: the number of the first virtual token, or that of each row, [B, 1].

    Raises:
        TuningError: the batch is no mapping with ``input_ids``.
    """
    tokens = _input_ids(batch)
    size, length = tokens.shape
    mask = torch.ones_like(tokens) if batch.get("attention_mask") is None else batch["attention_mask"]
    start = mask.to(torch.int).argmax(1, keepdim=True) + after
    columns = torch.arange(length + count, device=tokens.device).expand(size, -1)
    virtual = (columns >= start) & (columns < start + count)
    source = torch.where(columns < start, columns, columns - count).clamp(0, length - 1)
    ids = torch.where(virtual, -1 - (columns - start + first), tokens.gather(1, source)).to(tokens.dtype)
    widened = {**batch, "attention_mask": _widen(mask, source, virtual, 1), "input_ids": ids}
    widened |= {n: _widen(value, source, virtual, 0) for n, value in batch.items() if _runs_along(n, value, tokens)}
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.shape == tokens.shape and not targets:
        widened["labels"] = _widen(labels, source, virtual, IGNORED)
    if isinstance(batch.get(SOURCE), Tensor):
        widened[SOURCE] = _widen(batch[SOURCE], source, virtual, 1)
    if isinstance(batch.get("position_ids"), Tensor):
        widened["position_ids"] = (widened["attention_mask"].cumsum(1) - 1).clamp(min=0)
    for name in _SPANS:
        if isinstance(batch.get(name), Tensor):
            widened[name] = batch[name] + (batch[name] >= start.squeeze(1)) * count
    return widened


class Text(NamedTuple):
    """One text of a batch: its tensors by the names that a model has for them, and what stands around these names."""

    entries: Mapping[str, Any]
    before: str = ""
    behind: str = ""

    def named(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Return entries by the names that they have in the batch."""
        return {f"{self.before}{n}{self.behind}": value for n, value in entries.items() if n not in _OF_ROWS}


def texts_of(batch: Any) -> list[Text]:
    """Return the texts of a batch: that of ``input_ids``, and others such as ``pos_input_ids`` and ``input_ids_b``.

    What a decoder reads or writes is none. To each other text belongs what has its name around one of the names that a
    tokenizer gives. A batch that is no mapping, or whose texts lie deeper in it, shows none.
    """
    names = [str(name) for name in batch] if isinstance(batch, Mapping) else []
    found = [name.split("input_ids", 1) for name in names if "input_ids" in name and "decoder" not in name]
    texts = []
    for before, behind in found:
        if (before or behind) and _is_text(batch, before, behind):
            own = {
                n: n[len(before) : len(n) - len(behind)] for n in names if n.startswith(before) and n.endswith(behind)
            }
            common = {name: batch[name] for name in _OF_ROWS if name in batch}
            texts.append(Text({short: batch[name] for name, short in own.items()} | common, before, behind))
    if "input_ids" not in names:
        return texts
    elsewhere = {name for text in texts for name in text.named(text.entries)}
    return [Text({name: v for name, v in batch.items() if name not in elsewhere} if texts else batch), *texts]


def _is_text(batch: Mapping[str, Any], before: str, behind: str) -> bool:
    ids = batch[f"{before}input_ids{behind}"]
    return isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point()


def is_widened(batch: Mapping[str, Any]) -> bool:
    """Tell whether a batch holds virtual tokens already."""
    return ask(_input_ids(batch), lambda ids: bool((ids < 0).any()))


def uniform_rows(count: int, dim: int) -> Tensor:
    """Return rows drawn from U(-0.5, 0.5), [P, d]."""
    return torch.empty(count, dim, dtype=torch.float32).uniform_(-0.5, 0.5)


def word_rows(table: nn.Module, ids: Sequence[int]) -> Tensor:
    """Return the embeddings of words as the table gives them (some tables scale them), [len(ids), d]."""
    with torch.no_grad():
        out = table(torch.tensor(ids, device=device_of(table)))
        return (out[0] if isinstance(out, tuple) else out).float().clone()


def frequent_ids(tokenizer: Any, vocab_size: int, most: int) -> list[int]:
    """Return the ids of the first ``most`` words of a vocabulary, which orders them by frequency.

    Left out: special and unused tokens, bytes and single characters, which BERT's vocabulary lists before the words.
    Where most of a vocabulary's words are single characters, as those of Chinese models are, these are its words; such
    models list them in the order of their codes.
    """
    special = set(tokenizer.all_special_ids)
    words: list[int] = []
    characters: list[int] = []
    whole = 0
    for token_id, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(vocab_size)))):
        word = (token or "").lstrip("Ġ▁").removeprefix("##")
        if token_id in special:
            continue
        if re.fullmatch(r"[^\W\d_]{2,}", word):
            words.append(token_id)
            whole += not (token or "").startswith("##")
        elif re.fullmatch(f"[{UNSPACED}]", word) and word == (token or "").lstrip("▁"):
            characters.append(token_id)
    return (sorted(words + characters) if len(characters) > whole else words)[:most]


def best_words(scores: Tensor, k: int, tokenizer: Any, largest: bool = True) -> list[list[tuple[str, float]]]:
    """Return, for each row of scores [P, words], the k words of the greatest or the least, with these.

    Raises:
        TuningError: k is below 1, or there are not so many words.
    """
    if not 1 <= k <= scores.shape[1]:
        raise TuningError(f"k={k} is out of range: the model has {scores.shape[1]} words.")
    values, ids = scores.topk(k, dim=1, largest=largest)
    words = (tokenizer.convert_ids_to_tokens(row.tolist()) for row in ids)
    return [list(zip(row, value.tolist(), strict=True)) for row, value in zip(words, values, strict=True)]


def real_length(ids: Tensor) -> int:
    """Return how many tokens of a row, [B, T], are no virtual ones."""
    return int((ids[:1] >= 0).sum())


def _runs_along(name: Any, value: Any, tokens: Tensor) -> bool:
    """Tell whether an entry of a batch says something of each token."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.shape[:2] != tokens.shape:
        return False
    return name not in _OWN_WAY and not _ELSEWHERE.fullmatch(str(name))


def _widen(value: Tensor, source: Tensor, virtual: Tensor, fill: int) -> Tensor:
    rest = [1] * (value.ndim - 2)
    index = source.view(*source.shape, *rest).expand(*source.shape, *value.shape[2:])
    return value.gather(1, index).masked_fill(virtual.view(*virtual.shape, *rest), fill)


def _input_ids(batch: Any) -> Tensor:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor):
        keys = f"with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
        raise TuningError(
            f"a soft prompt is put into batches that are mappings with input_ids, this one is a {type(batch).__name__} "
            f"{keys}".rstrip()
            + ": let the collate function return what the tokenizer gives."
        )
    return ids
