"""Templates that a T5 writes around the answers of solved rows, as candidates for a prompt.

The model sees the text and the answer of each training row with a gap on either side of the answer, and fills the gaps
with the words that are likeliest for all rows together, found by a beam search over

    sum over rows  sum_t  log p(word_t | the words before it, text and answer of the row).

A row of one field is asked about behind its text and before it, half of the candidates each; of two fields, the answer
stands between them. An ``{answer}``, which a model writes, is the last of its template: what would stand behind it is
left out. The words end where the model writes the sentinel of the next gap, or the end.

Source: Gao et al. 2021 (2012.15723), section 5.2. Their code averages logits in place of log-likelihoods: the same
order of the words after one beginning, but not of two beginnings; here it is the formula of the paper. Theirs also
lets words run to 20 tokens that end no gap, writes the second text of a pair in small letters and drops the last letter
of the first; here the first is left out, and texts stay what they are. They tune the model with each template before
these are compared on validation rows; here the frozen model is asked, which needs no training.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from lightning_peft.core.errors import TuningError
from lightning_peft.core.hub import load_model, load_tokenizer
from lightning_peft.data.span_corruption import sentinels
from lightning_peft.prompting.encoding import special_ids, text_ids
from lightning_peft.prompting.template import Template
from lightning_peft.tasks.prompted import PromptedTask, padded
from lightning_peft.tasks.written_prompts import solved_rows

LONGEST = 18
"""Of the words of a template with what ends them [tokens]."""
_TEXT = 200
"""Of a text, next to the gap [tokens]."""
SHOTS, MOST = 16, 64
"""How many rows of each answer are read, and how many in all."""
_ROWS = 32
"""How many rows the decoder reads together."""


@dataclass(frozen=True)
class Filled:
    """What fills the gaps.

    Args:
        before: the tokens before the answer.
        behind: those behind it.
        score: the mean over the rows of their summed log-likelihood.
    """

    before: tuple[int, ...]
    behind: tuple[int, ...]
    score: float


@dataclass
class Filler:
    """A T5 that fills gaps.

    Args:
        model: the encoder-decoder.
        tokenizer: its own.
    """

    model: Any
    tokenizer: Any

    def __post_init__(self) -> None:
        self.gaps = sentinels(self.tokenizer)[:3]
        # The rows of a table beyond the vocabulary are padding.
        size = self.model.get_output_embeddings().weight.shape[0]
        special = {*self.tokenizer.all_special_ids, *sentinels(self.tokenizer)}
        never = [number in special or not _is_word(self.tokenizer, number) for number in range(size)]
        self.never = torch.tensor(never, device=next(self.model.parameters()).device)
        self.dot = text_ids(self.tokenizer, "a.")[-1]

    def source(self, before: str, answer: str, behind: str) -> list[int]:
        """Return the ids of a row with gaps around its answer."""
        opening, closing = special_ids(self.tokenizer)
        first, second = (text_ids(self.tokenizer, text) if text else [] for text in (before, behind))
        middle = [self.gaps[0], *text_ids(self.tokenizer, answer), self.gaps[1]]
        return [*opening, *first[-_TEXT:], *middle, *second[:_TEXT], *closing]

    @torch.no_grad()
    def fill(self, sources: Sequence[list[int]], beams: int) -> list[Filled]:
        """Return the likeliest words for the gaps of all sources together, the best first."""
        batch = {n: v.to(self.never.device) for n, v in padded(self.tokenizer, "seq2seq", sources).items()}
        encoded = self.model.get_encoder()(**batch).last_hidden_state
        mask = batch["attention_mask"]
        alive: list[tuple[float, tuple[int, ...]]] = [(0.0, (self.gaps[0],))]
        done: list[tuple[float, tuple[int, ...]]] = []
        for _ in range(LONGEST):
            grown = [
                (score + more, (*words, word))
                for score, words in alive
                for more, word in self._next(encoded, mask, words, beams)
            ]
            best = sorted([*done, *grown], reverse=True)[:beams]
            done = [one for one in best if self._ended(one[1])]
            alive = [one for one in best if not self._ended(one[1])]
            if not alive:
                break
        return [self._split(words, score) for score, words in sorted(done, reverse=True)]

    def _next(self, encoded: Tensor, mask: Tensor, words: tuple[int, ...], most: int) -> list[tuple[float, int]]:
        """Return the likeliest words behind some, with the mean of their log-likelihoods over the rows."""
        start = self.model.config.decoder_start_token_id
        inputs = torch.tensor([[start, *words]], device=mask.device)
        total = torch.zeros(len(self.never), device=mask.device)
        for states, seen in zip(encoded.split(_ROWS), mask.split(_ROWS), strict=True):
            logits = self.model(
                encoder_outputs=(states,),
                attention_mask=seen,
                decoder_input_ids=inputs.expand(len(states), -1),
                use_cache=False,
            ).logits
            total += logits[:, -1].float().log_softmax(-1).sum(0)
        never = self.never.clone()
        never[self._ends(words)] = False
        never[self.dot] |= words[-1] == self.dot
        found = (total / len(encoded)).masked_fill(never, -torch.inf).topk(min(most, int((~never).sum())))
        return list(zip(found.values.tolist(), found.indices.tolist(), strict=True))

    def _ends(self, words: tuple[int, ...]) -> list[int]:
        """Return what may end the gap that is being filled."""
        if self.gaps[1] not in words:
            return [self.gaps[1]]
        end = self.tokenizer.eos_token_id
        return [self.gaps[2]] if end is None else [self.gaps[2], end]

    def _ended(self, words: tuple[int, ...]) -> bool:
        return self.gaps[1] in words[:-1] and words[-1] in self._ends(words)

    def _split(self, words: tuple[int, ...], score: float) -> Filled:
        middle = words.index(self.gaps[1])
        return Filled(words[1:middle], words[middle + 1 : -1], score)

    def said(self, ids: Sequence[int]) -> str:
        """Return the words of tokens with the blank that they have behind a word."""
        word = text_ids(self.tokenizer, "a")
        alone, both = (
            self.tokenizer.decode(each, clean_up_tokenization_spaces=False) for each in (word, [*word, *ids])
        )
        text = both[len(alone) :] if both.startswith(alone) else f" {self.tokenizer.decode(list(ids))}"
        return text.replace("{", "{{").replace("}", "}}")


def filled_prompts(
    task: PromptedTask, data: L.LightningDataModule, template: str, most: int, writer: Any, seed: int = 0
) -> list[str]:
    """Return templates whose words a T5 has written, the likeliest of each form first.

    Args:
        task: asks by them; its first template says which fields a row has.
        data: has the training rows.
        template: that of the task.
        most: how many templates, and how many beams the search has.
        writer: folder or hub id of the T5; None: the model of the task.
        seed: draws the rows that are read.

    Raises:
        TuningError: there is no such model, no training rows, or the template has too many fields.
    """
    asked = Template(template)
    names, slot = asked.fields, "{mask}" if asked.is_cloze else "{answer}"
    if not 1 <= len(names) <= (2 if asked.is_cloze else 1):
        raise TuningError(
            f"how='fill' writes words around one text or, with {{mask}} for the answer, between two, and {asked} has "
            f"{len(names)} fields: give the task such a template."
        )
    filler, rows = _filler(task, writer), _few(solved_rows(task, data), seed)
    forms: list[tuple[str | None, str | None]] = [(names[0], None)]  # an {answer} is written, so it is last
    if asked.is_cloze:
        forms = [*forms, (None, names[0])] if len(names) == 1 else [(names[0], names[1])]
    found: list[str] = []
    for before, behind in forms:
        sources = [filler.source(_text(row, before), answer, _text(row, behind)) for row, answer in rows]
        for one in filler.fill(sources, most)[: -(-most // len(forms))]:
            words = f"{filler.said(one.before)} {slot}{filler.said(one.behind) if asked.is_cloze else ''}"
            text = f"{{{before}}}{words}" if before else words.lstrip()
            found.append(f"{text} {{{behind}}}" if behind else text)
    return [text for text in dict.fromkeys(found) if text != template]


def _few(rows: list[tuple[Mapping[str, Any], str]], seed: int) -> list[tuple[Mapping[str, Any], str]]:
    """Return rows drawn from many, so many of each answer."""
    counts: Counter[str] = Counter()
    kept: list[tuple[Mapping[str, Any], str]] = []
    for row, answer in random.Random(seed).sample(rows, len(rows)):
        if counts[answer] < SHOTS and len(kept) < MOST:
            counts[answer] += 1
            kept.append((row, answer))
    return kept


def _filler(task: PromptedTask, writer: Any) -> Filler:
    if writer is not None and not isinstance(writer, str):
        raise TuningError("how='fill' needs a T5: give writer= its folder or hub id.")
    if writer is None:
        model, tokenizer, name = task.backbone, task.tokenizer, task.model_name
    else:
        tokenizer, name = load_tokenizer(writer), writer
        model = load_model(AutoModelForSeq2SeqLM, writer, "encoder-decoder language model", dtype="float32")
        model = model.to(next(task.backbone.parameters()).device).eval()
    if not model.config.is_encoder_decoder or len(sentinels(tokenizer)) < 3:
        raise TuningError(f"{name} fills no gaps of <extra_id_0>: give writer= the folder or hub id of a T5.")
    return Filler(model, tokenizer)


def _text(row: Mapping[str, Any], name: str | None) -> str:
    return "" if name is None or row[name] is None else str(row[name])


def _is_word(tokenizer: Any, number: int) -> bool:
    """Tell whether a token may stand in a template: no blank, and no row of dots."""
    text: str = tokenizer.decode([number]).strip() if number < len(tokenizer) else ""
    return bool(text) and not (len(text) > 1 and set(text) == {"."})
