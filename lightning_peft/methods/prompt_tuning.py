"""Prompt-Tuning: P trained rows are put before the word embeddings of the input, ``[P_e; X_e]``; the model is frozen.

Source: Lester et al. 2021, arXiv 2104.08691, section 2 and 3.2. In an encoder-decoder the prompt is in the encoder
input alone. The paper draws random rows from U(-0.5, 0.5), the released configuration from U(0, 0.5): we follow the
paper. "First 5,000 ids" are frequent words in a SentencePiece vocabulary, in BERT's 999 of them are special or unused:
we count words. In an encoder the prompt goes after [CLS], so that what is pooled stays [CLS].
"""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft import select
from lightning_peft.errors import TuningError
from lightning_peft.graft import attach, grafts
from lightning_peft.method import Method
from lightning_peft.mixin import MethodMixin
from lightning_peft.virtual_tokens import (
    VirtualTokens,
    frequent_ids,
    insert,
    is_widened,
    random_rows,
    word_rows,
)

INITS = ("random_uniform", "sampled_vocab", "text", "class_labels")


@dataclass(eq=False, kw_only=True)
class PromptTuning(Method):
    """Train a soft prompt of P virtual tokens before the input.

    Args:
        num_virtual_tokens: length P of the prompt [tokens].
        init: 'random_uniform' U(-0.5, 0.5); 'sampled_vocab' rows of frequent words, each word once; 'text' the tokens
            of ``text``, repeated or cut to P; 'class_labels' the mean over the tokens of each label, the rest sampled.
        text: the words of init='text'.
        class_labels: the words of init='class_labels'; None: the label names of the backbone's configuration.
        top_words: how many frequent words 'sampled_vocab' draws from.
        tokenizer: folder or hub id of the tokenizer; None: that of the backbone.
        seed: of the drawing; None: the global generator.
    """

    num_virtual_tokens: int = 20
    init: Literal["random_uniform", "sampled_vocab", "text", "class_labels"] = "sampled_vocab"
    text: str | None = None
    class_labels: list[str] | None = None
    top_words: int = 5000
    tokenizer: str | None = None
    seed: int | None = None

    kind: ClassVar[str] = "prompt"
    trains: ClassVar[str] = "the embeddings of virtual tokens in the input"
    paper: ClassVar[str] = "Lester et al. 2021, arXiv 2104.08691"
    may_change: ClassVar[frozenset[str]] = Method.may_change | {
        "init", "text", "class_labels", "top_words", "tokenizer", "seed"
    }  # fmt: skip

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach the prompt to the word table and its tied twins."""
        if self.num_virtual_tokens < 1:
            raise TuningError(f"num_virtual_tokens={self.num_virtual_tokens} is no prompt: take 1 or more.")
        if self.init not in INITS:
            raise TuningError(f"init={self.init!r} is no initial value of a prompt: take one of {', '.join(INITS)}.")
        tables = select.word_tables(backbone)
        limit = select.max_positions(backbone)
        if limit is not None and self.num_virtual_tokens >= limit:
            raise TuningError(
                f"num_virtual_tokens={self.num_virtual_tokens} leaves no room in the {limit} positions of "
                f"{type(backbone).__name__}: take fewer."
            )
        table = next(iter(tables.values()))
        rows = self._initial_rows(backbone, table)
        weight = nn.Parameter(rows.to(table.weight.device))  # type: ignore[arg-type]
        for host in tables.values():
            attach(host, VirtualTokens(weight), self.name)
        self._limit = limit
        self._after = 1 if select.is_encoder(backbone) else 0
        self._targets = bool(getattr(getattr(backbone, "config", None), "is_encoder_decoder", False))
        return ()

    def prepare(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the batch with the prompt in every row; one that has virtual tokens already is returned as it is.

        Raises:
            TuningError: the batch is no mapping with ``input_ids``, or with the prompt too long for the positions.
        """
        if not is_widened(batch):
            batch = insert(batch, self.num_virtual_tokens, self._after, self._targets)
            length = batch["input_ids"].shape[1]
            if self._limit is not None and length > self._limit:
                raise TuningError(
                    f"{length - self.num_virtual_tokens} tokens and a prompt of {self.num_virtual_tokens} do not fit "
                    f"the {self._limit} positions of the model: set max_length to "
                    f"{self._limit - self.num_virtual_tokens}."
                )
        return batch

    def rows(self, model: nn.Module) -> Tensor:
        """Return the prompt, [P, d].

        Raises:
            TuningError: the method is not applied to ``model``.
        """
        for place in grafts(model):
            if isinstance(place.graft, VirtualTokens) and place.name == self.name:
                return place.graft.weight
        raise TuningError(f"{type(self).__name__} is not applied to this {type(model).__name__}: apply it first.")

    def nearest_words(self, model: nn.Module, k: int = 5) -> list[list[tuple[str, float]]]:
        """Return, for each virtual token, the k words of highest cosine, with it (section 7 of the paper)."""
        backbone = select.backbone_of(model, self.backbone)
        table = next(iter(select.word_tables(backbone).values()))
        with torch.no_grad():
            words = F.normalize(table.weight.float(), dim=1)  # type: ignore[arg-type]
            cosine = F.normalize(self.rows(backbone).float(), dim=1) @ words.t()
        values, ids = cosine.topk(k, dim=1)
        tokenizer = self._tokenizer(backbone)
        return [
            list(zip(tokenizer.convert_ids_to_tokens(row.tolist()), value.tolist(), strict=True))
            for row, value in zip(ids, values, strict=True)
        ]

    def _initial_rows(self, backbone: nn.Module, table: nn.Module) -> Tensor:
        count = self.num_virtual_tokens
        weight: Tensor = table.weight  # type: ignore[assignment]
        if self.init == "random_uniform" or weight.is_meta:
            return random_rows(count, weight.shape[1])
        tokenizer = self._tokenizer(backbone)
        if self.init == "text":
            if not self.text:
                raise TuningError("init='text' needs the words of the prompt: give text=.")
            ids = tokenizer(self.text, add_special_tokens=False)["input_ids"]
            if not ids:
                raise TuningError(f"text={self.text!r} has no tokens: give the words of the prompt.")
            return word_rows(table, [ids[i % len(ids)] for i in range(count)])
        if self.top_words < 1:
            raise TuningError(f"top_words={self.top_words} leaves no words to draw from: take 1 or more.")
        draw = random.Random(self.seed if self.seed is not None else torch.randint(2**31, ()).item())
        frequent = frequent_ids(tokenizer, weight.shape[0], self.top_words)
        if not frequent:
            raise TuningError(
                f"the tokenizer of {type(backbone).__name__} has no words to sample: use init='random_uniform'."
            )
        sampled = draw.sample(frequent, count) if count <= len(frequent) else draw.choices(frequent, k=count)
        rows = word_rows(table, sampled)
        if self.init == "class_labels":
            labels = self._labels(backbone)
            if len(labels) > count:
                raise TuningError(
                    f"{len(labels)} class labels do not fit a prompt of {count} virtual tokens: "
                    f"set num_virtual_tokens to {len(labels)} or more."
                )
            for i, label in enumerate(labels):
                ids = tokenizer(label, add_special_tokens=False)["input_ids"]
                if not ids:
                    raise TuningError(f"the class label {label!r} has no tokens: give its words with class_labels=.")
                rows[i] = word_rows(table, ids).mean(0)
        return rows

    def _labels(self, backbone: nn.Module) -> list[str]:
        if self.class_labels is not None:
            return self.class_labels
        names = list((getattr(backbone.config, "id2label", None) or {}).values())
        if not names or all(name.startswith("LABEL_") for name in names):
            raise TuningError("init='class_labels' needs the names of the classes: give class_labels=.")
        return names

    def _tokenizer(self, backbone: nn.Module) -> Any:
        from transformers import AutoTokenizer

        name = self.tokenizer or getattr(getattr(backbone, "config", None), "_name_or_path", "")
        if not name:
            raise TuningError(f"init={self.init!r} needs the words of the model: give tokenizer= (a folder or hub id).")
        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise TuningError(f"no tokenizer at {name!r} ({str(error).splitlines()[0]}): give tokenizer=.") from None


class PromptTuningMixin(MethodMixin):
    """For a LightningModule that is tuned by a soft prompt: set ``self.method`` to change its arguments."""

    default_method = PromptTuning

    def nearest_words(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """Return, for each virtual token, the k words of highest cosine, with it."""
        assert isinstance(self.method, PromptTuning)
        return self.method.nearest_words(self, k)  # type: ignore[arg-type]
