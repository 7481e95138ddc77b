"""The loss of a batch is that of its rows, each weighed with what its task counts: tokens, words or gaps."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_peft import CausalLM, ClozeClassification, LMAdaptation, Seq2Seq, TokenClassification
from lightning_peft.tasks.base import Task

TEXTS = ["where does anmar live in the valley ?", "who sings ?"]
WORDS = {"good": ["good"], "bad": ["bad"]}
TASKS: dict[str, Callable[[Callable[[str], str]], Task]] = {
    "causal": lambda folder: CausalLM(folder("gpt2")),
    "seq2seq": lambda folder: Seq2Seq(folder("t5")),
    "adaptation": lambda folder: LMAdaptation(folder("t5")),
    "words": lambda folder: TokenClassification(folder("bert"), ["O", "B-X"]),
    "cloze": lambda folder: ClozeClassification(folder("bert"), WORDS),
}


def rows_of(task: Task) -> dict[str, Tensor]:
    """Return two rows of unlike length."""
    cloze = isinstance(task, ClozeClassification)
    texts = [f"{text} {task.tokenizer.mask_token}" if cloze else text for text in TEXTS]
    batch = dict(task.tokenizer(texts, padding=True, return_tensors="pt"))
    ids = batch["input_ids"] % 2 if isinstance(task, TokenClassification) else batch["input_ids"]
    return batch | {"labels": torch.arange(2) if cloze else ids.masked_fill(batch["attention_mask"] == 0, -100)}


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_is_its_rows_by_what_they_count(name: str, valley: Callable[[str], str]) -> None:
    task = TASKS[name](valley).eval()
    whole = rows_of(task)
    batches = [whole, *({key: value[i : i + 1] for key, value in whole.items()} for i in range(2))]
    counts = [task.counted(batch) for batch in batches]
    assert counts[0] == counts[1] + counts[2]
    assert name == "cloze" or counts[1] > counts[2]
    parameters = [p for p in task.parameters() if p.requires_grad]
    one, first, second = (
        torch.autograd.grad(task.loss(batch) * count / counts[0], parameters, allow_unused=True)
        for batch, count in zip(batches, counts, strict=True)
    )
    pairs = [(a, b + c) for a, b, c in zip(one, first, second, strict=True) if a is not None]
    assert len(pairs) > 10
    assert all((a - b).abs().max() <= 1e-6 * max(1, a.abs().max()) for a, b in pairs)
