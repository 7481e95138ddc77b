"""Prompt-Tuning: P trained rows are put before the word embeddings of the input, ``[P_e; X_e]``; the model is frozen.

Source: Lester et al. 2021, arXiv 2104.08691, sections 2, 3.2 and 5. In an encoder-decoder the prompt is in the encoder
input alone. The paper draws random rows from U(-0.5, 0.5), the released configuration from U(0, 0.5): we follow the
paper. "First 5,000 ids" are frequent words in a SentencePiece vocabulary, in BERT's 999 of them are special or unused:
we count words. In an encoder the prompt goes after [CLS], so that what is pooled stays [CLS]. The default length is 20,
where the released configuration has 100: the paper finds little gain beyond 20 (section 3.2), each token costs room and
time in every batch, and 20 is what other libraries start from; give 100 to compare with its tables. A text that is
shorter than the prompt is repeated, where their code leaves the rest random; more labels than tokens are refused, where
it leaves some out. They train by Adafactor without scaling by the parameter, at a constant 0.3; our rate is for AdamW.

Before the text of a causal model the prompt does not depend on the text, so it is computed once a batch and its
positions have no outputs. Where the source of an encoder-decoder is a sound or an image (Whisper, TrOCR), the prompt
comes before the target, which has no part of it in its output. With several prompts, one a task, each row of a batch
says by ``task_ids`` which it has; the prompts are then in the input.
"""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.bases.prompt import PromptMethod, cut_to
from lightning_peft.core import structure
from lightning_peft.core.arguments import natural
from lightning_peft.core.errors import TuningError
from lightning_peft.core.host_copy import ask
from lightning_peft.core.hub import tokenizer_of
from lightning_peft.core.placement import device_of, has_values
from lightning_peft.core.rates import MEASURED, Rates
from lightning_peft.prompts.virtual_tokens import frequent_ids, insert, uniform_rows, word_rows
from lightning_peft.training.mixin import TunedBy


@dataclass(eq=False, kw_only=True)
class PromptTuning(PromptMethod):
    """Train a soft prompt of P virtual tokens before the input.

    Args:
        num_prompts: how many prompts; with more than one, ``task_ids`` [B] of a batch says which each row has.
        init: 'random_uniform' U(-0.5, 0.5); 'sampled_vocab' rows of frequent words, each word once; 'text' the tokens
            of ``text``, repeated or cut to P; 'class_labels' the mean over the tokens of each label, the rest sampled.
        text: the words of init='text'.
        class_labels: the words of init='class_labels'; None: the label names of the backbone's configuration.
        top_words: how many frequent words 'sampled_vocab' draws from.
        seed: of the drawing; None: the global generator.
        before_cls: put the prompt of an encoder before [CLS], as HF PEFT does; a virtual token is then pooled.
    """

    num_prompts: int = natural(1, "is no number of prompts")
    init: Literal["random_uniform", "sampled_vocab", "text", "class_labels"] = "sampled_vocab"
    text: str | None = None
    class_labels: list[str] | None = None
    top_words: int = natural(5000, "leaves no words to draw from")
    seed: int | None = None
    before_cls: bool = False

    paper: ClassVar[str] = "Lester et al. 2021, arXiv 2104.08691"
    advised: ClassVar[Rates] = Rates(9e-2, 3e-2, MEASURED)
    may_change: ClassVar[frozenset[str]] = PromptMethod.may_change | {
        "init", "text", "class_labels", "top_words", "seed"
    }  # fmt: skip

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach the prompt."""
        table = next(iter(structure.word_tables(backbone).values()))
        rows = torch.cat([self.initial_rows(backbone, table) for _ in range(self.num_prompts)])
        weight = nn.Parameter(rows.to(device_of(table)))
        self.place(backbone, weight, anywhere=self.num_prompts > 1, before_cls=self.before_cls)
        return ()

    def insert(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the batch with the prompt of its task in every row.

        Raises:
            TuningError: there are several prompts, and the batch does not say which its rows have.
        """
        if self.num_prompts == 1:
            return super().insert(batch)
        tasks = batch.get("task_ids") if isinstance(batch, Mapping) else None
        if not isinstance(tasks, Tensor):
            raise TuningError(
                f"num_prompts={self.num_prompts}, but the batch does not say which prompt its rows have: "
                "let it hold task_ids, [B]."
            )
        low, high = ask(tasks, lambda given: (int(given.min()), int(given.max())))
        if low < 0 or high >= self.num_prompts:
            raise TuningError(
                f"task id {low if low < 0 else high} is out of range: there are prompts 0 to {self.num_prompts - 1}, "
                "so set num_prompts to the number of tasks."
            )
        first = tasks.view(-1, 1) * self.num_virtual_tokens
        return insert(batch, self.num_virtual_tokens, self._after, self._targets, first)

    def _prompts(self) -> int:
        return self.num_prompts

    def initial_rows(self, backbone: nn.Module, table: nn.Module) -> Tensor:
        """Return the rows that a prompt starts from, [P, d]."""
        count = self.num_virtual_tokens
        weight: Tensor = table.weight  # type: ignore[assignment]
        if self.init == "random_uniform" or not has_values(table):
            return uniform_rows(count, weight.shape[1])
        if self.init == "text":
            return word_rows(table, cut_to(self.ids_of(backbone, self.text), count))
        rows = word_rows(table, self._sampled(backbone, weight.shape[0]))
        if self.init == "class_labels":
            for i, ids in enumerate(self._label_ids(backbone)):
                rows[i] = word_rows(table, ids).mean(0)
        return rows

    def _sampled(self, backbone: nn.Module, vocabulary: int) -> list[int]:
        tokenizer = tokenizer_of(backbone, self.tokenizer, f"init={self.init!r}")
        draw = random.Random(self.seed if self.seed is not None else torch.randint(2**31, ()).item())
        frequent, count = frequent_ids(tokenizer, vocabulary, self.top_words), self.num_virtual_tokens
        if not frequent:
            raise TuningError(
                f"the tokenizer of {type(backbone).__name__} has no words to sample: use init='random_uniform'."
            )
        return draw.sample(frequent, count) if count <= len(frequent) else draw.choices(frequent, k=count)

    def _label_ids(self, backbone: nn.Module) -> list[list[int]]:
        labels = self.class_labels
        if labels is None:
            labels = list((structure.setting(structure.config_of(backbone), "id2label") or {}).values())
            if not labels or all(name.startswith("LABEL_") for name in labels):
                raise TuningError("init='class_labels' needs the names of the classes: give class_labels=.")
        if len(labels) > self.num_virtual_tokens:
            raise TuningError(
                f"{len(labels)} class labels do not fit a prompt of {self.num_virtual_tokens} virtual tokens: "
                f"set num_virtual_tokens to {len(labels)} or more."
            )
        tokenizer = tokenizer_of(backbone, self.tokenizer, "init='class_labels'")
        ids = [tokenizer(label, add_special_tokens=False)["input_ids"] for label in labels]
        for label, tokens in zip(labels, ids, strict=True):
            if not tokens:
                raise TuningError(f"the class label {label!r} has no tokens: give its words with class_labels=.")
        return ids


class PromptTuningMixin(TunedBy[PromptTuning]):
    """For a LightningModule that is tuned by a soft prompt: set ``self.method`` to change its arguments."""

    def nearest_words(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """Return, for each virtual token, the k words of highest cosine, with it."""
        method, module = self._owned()
        return method.nearest_words(module, k)
