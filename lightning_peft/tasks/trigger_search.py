"""Words that the gradient of the loss points to: which word in the place of one of a template's would lower it most.

The word's row of the table of embeddings moves as a virtual token; ``-∇ · e_w`` is, to first order, what the loss
changes by with word w in its place, but for what is the same for all.

Source: Shin et al. 2020 (2010.15980), section 2.2; Wallace et al. 2019 (1908.07125).
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import attach, detach
from lightning_peft.prompting.candidates import pieces_of, words_in
from lightning_peft.prompting.encoding import encode, word_ids
from lightning_peft.prompting.template import Template
from lightning_peft.prompts.virtual_tokens import VirtualTokens
from lightning_peft.tasks.prompted_classification import PromptedClassification
from lightning_peft.tasks.written_prompts import solved_rows

ROWS = 16
"""Whose mean gradient counts."""
_NAME = "search"


def better_words(
    task: PromptedClassification, data: L.LightningDataModule, template: str, place: int, most: int, seed: int
) -> list[str]:
    """Return templates with another word in one place, the most promising first.

    Args:
        task: whose loss counts, that of a masked or causal model.
        data: has the training rows.
        template: where a word is replaced.
        place: of the word, counted around.
        most: how many templates.
        seed: of the rows that are drawn.

    Raises:
        TuningError: the model is an encoder-decoder, or the template has no words.
    """
    if task.lm == "seq2seq":
        raise TuningError("how='gradient' is for masked and causal language models: take how='edits'.")
    pieces = pieces_of(template)
    words = words_in(pieces)
    if not words:
        raise TuningError(f"{template!r} has no words of its own to replace: write some, or take how='edits'.")
    at = words[place % len(words)]
    rows, draw = solved_rows(task, data), random.Random(seed + place)
    chosen = draw.sample(rows, min(ROWS, len(rows)))
    marked = Template("".join([*pieces[:at], "{v:1}", *pieces[at + 1 :]]))
    lead = " " if at and pieces[at - 1].isspace() else ""
    scores = _promise(task, marked, lead + pieces[at], chosen)
    others = (word for _, word in whole_words(task, scores, lead) if word != pieces[at])
    return ["".join([*pieces[:at], word, *pieces[at + 1 :]]) for word in islice(others, most)]


def whole_words(task: PromptedClassification, scores: Tensor, lead: str) -> Iterator[tuple[int, str]]:
    """Yield the tokens that are whole words of letters where ``lead`` stands before them, those of high scores first.

    Args:
        task: whose tokenizer knows the words.
        scores: of all tokens, [V].
        lead: a blank, or nothing.
    """
    for number in scores.argsort(descending=True).tolist():
        word = task.tokenizer.decode([number]).strip()
        if word.isalpha() and _is_one_token(task, word, lead, number):
            yield number, word


def _promise(
    task: PromptedClassification, template: Template, word: str, rows: Sequence[tuple[Mapping[str, Any], str]]
) -> Tensor:
    """Return ``-∇ · e_w`` of every word of the model in the place of the template's virtual token, [V]."""
    table = next(iter(structure.word_tables(task.backbone).values()))
    weight: Tensor = table.weight  # type: ignore[assignment]
    own = task.tokenizer(word, add_special_tokens=False)["input_ids"]
    row = nn.Parameter(weight.detach()[own[:1]].float().clone())
    attach(table, VirtualTokens(row), _NAME)
    try:
        with torch.enable_grad():
            torch.stack([_loss(task, template, fields, answer) for fields, answer in rows]).mean().backward()
    finally:
        detach(table, _NAME)
    assert row.grad is not None
    return -(weight.detach().float() @ row.grad[0])


def _loss(task: PromptedClassification, template: Template, fields: Mapping[str, Any], answer: str) -> Tensor:
    """Return ``-log p`` of the words of the answer, all masks at once."""
    word = word_ids(task.tokenizer, answer, template.lead)
    encoded = encode(
        template, task.tokenizer, fields, style=task.lm, max_length=task.room - len(word), masks=len(word),
        options=task.prompts.options,
    )  # fmt: skip
    ids = encoded.input_ids if task.lm == "masked" else [*encoded.input_ids, *word]
    device = next(task.backbone.parameters()).device
    logits: Tensor = task.backbone(input_ids=torch.tensor([ids], device=device)).logits[0].float()
    first = encoded.slot if task.lm == "masked" else len(encoded.input_ids) - 1
    likely = logits[first : first + len(word)].log_softmax(-1)
    return -likely[range(len(word)), word].sum()


def _is_one_token(task: PromptedClassification, word: str, lead: str, number: int) -> bool:
    """Tell whether a word, written in its place, is that one token."""
    try:
        return word_ids(task.tokenizer, word, lead) == [number]
    except TuningError:
        return False
