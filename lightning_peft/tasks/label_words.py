"""Words for the labels of a task, found by what a language model says after rows of each label.

Of each label c the K words v of one token are kept that are likeliest after its training rows,

    sum over rows x of c  log p(v | x in the template),

and all combinations of a word of each label are ordered by how many training rows they tell rightly. K is 100, or less
where that were too many combinations.

Source: Gao et al. 2021 (2012.15723), section 5.1, without its second step by the neighbours of hand-written words, as
its code does where none are given. Their code averages logits, which orders the words of a label alike but for the
normaliser of each row, and looks at words of RoBERTa that begin with a blank; here they are letters alone, and whole.
They tune the model with each of the best before these are compared on validation rows; here the frozen model is asked.
"""

from collections.abc import Sequence
from itertools import islice, product
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_peft.core.errors import TuningError
from lightning_peft.prompting.encoding import encode
from lightning_peft.tasks.prompted import padded
from lightning_peft.tasks.prompted_classification import PromptedClassification
from lightning_peft.tasks.trigger_search import whole_words
from lightning_peft.tasks.written_prompts import solved_rows

LIKELY, MOST = 100, 50_000
"""The most words of a label, and the most combinations of words of all labels."""
_AT_ONCE = 32


def label_words(task: PromptedClassification, data: L.LightningDataModule, most: int) -> list[dict[str, str]]:
    """Return words for the labels, those first that tell most training rows rightly; of equals, the likeliest.

    Args:
        task: whose model, first template and labels they are for.
        data: has the training rows, all of which are read.
        most: how many combinations.

    Raises:
        TuningError: the model is an encoder-decoder, or there are no training rows.
    """
    if task.lm == "seq2seq":
        raise TuningError("how='words' is for masked and causal language models: take how='edits'.")
    rows = solved_rows(task, data)
    labels = torch.tensor([task.prompts.options.index(answer) for _, answer in rows])
    likely = torch.cat([_likely(task, rows[at : at + _AT_ONCE]) for at in range(0, len(rows), _AT_ONCE)])
    own = torch.stack([likely[labels == c].sum(0) for c in range(len(task.labels))])
    count = max(2, min(LIKELY, int(MOST ** (1 / len(task.labels)))))
    lead = task.templates[0].lead
    chosen = [[number for number, _ in islice(whole_words(task, scores, lead), count)] for scores in own]
    pairings = [one for one in product(*chosen) if len({*one}) == len(one)]
    right = [int((likely[:, list(one)].argmax(1) == labels).sum()) for one in pairings]
    order = sorted(range(len(pairings)), key=lambda i: -right[i])  # products come with the likeliest first
    said = [[task.tokenizer.decode([number]).strip() for number in pairings[i]] for i in order[:most]]
    return [dict(zip(task.labels, words, strict=True)) for words in said if words != task.prompts.options]


@torch.no_grad()
def _likely(task: PromptedClassification, rows: Sequence[tuple[Any, str]]) -> Tensor:
    """Return log p of every token in the gap of each row, [B, V]."""
    template = task.templates[0]
    encoded = [
        encode(
            template, task.tokenizer, row, style=task.lm, max_length=task.room - 1, options=task.prompts.options
        )
        for row, _ in rows
    ]  # fmt: skip
    batch = padded(task.tokenizer, "masked", [one.input_ids for one in encoded])
    device = next(task.backbone.parameters()).device
    logits: Tensor = task.backbone(**{name: value.to(device) for name, value in batch.items()}).logits
    places = [one.slot - (task.lm == "causal") for one in encoded]  # a causal model says the next token
    return logits[range(len(rows)), places].float().log_softmax(-1).cpu()
