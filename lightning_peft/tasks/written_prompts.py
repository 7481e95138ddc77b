"""Instructions that a model writes itself from solved rows, as candidates for a prompt.

Source: Zhou et al. 2022 (2211.01910), section 3.1 and the forward template of its figure 2.
"""

import random
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch

from lightning_peft.core.errors import TuningError
from lightning_peft.data.classes import class_numbers
from lightning_peft.data.protocols import LabelledRows, Rows
from lightning_peft.prompting.encoding import special_ids, text_ids
from lightning_peft.prompting.template import Template
from lightning_peft.tasks.prompted import PromptedTask, padded
from lightning_peft.tasks.prompted_classification import PromptedClassification
from lightning_peft.tasks.prompted_generation import PromptedGeneration
from lightning_peft.tasks.sampling import Sampler

_ASKED = (
    "I gave a friend an instruction and some inputs. The friend read the instruction and wrote an output for every one "
    "of the inputs. Here are the input-output pairs:\n\n{pairs}\n\nThe instruction was:"
)
SHOWN = 5
"""How many solved rows the model sees."""
_LONGEST = 40
"""Of an instruction [tokens]."""


def solved_rows(task: PromptedTask, data: L.LightningDataModule) -> list[tuple[Mapping[str, Any], str]]:
    """Return the training rows with the words of their right answers.

    Raises:
        TuningError: there are none.
    """
    rows = data.rows("train") if isinstance(data, Rows) else None
    if rows is None:
        raise TuningError("this search reads training rows, and there are none: give a train split, or how='edits'.")
    if isinstance(task, PromptedGeneration):
        return [(row, task.right_answers(row)[0]) for row in rows]
    if not isinstance(task, PromptedClassification) or not isinstance(data, LabelledRows):
        raise TuningError(f"{type(data).__name__} has no classes for {type(task).__name__}: give labelled rows.")
    numbers = dict(class_numbers(rows, data.label, "train", task.labels))
    return [(row, task.prompts.options[numbers[row[data.label]]]) for row in rows]


def written_prompts(task: PromptedTask, data: L.LightningDataModule, template: str, most: int, seed: int) -> list[str]:
    """Return a template behind each of some instructions that the model writes from solved rows.

    Raises:
        TuningError: the model writes no texts, or there are no training rows.
    """
    if task.lm == "masked":
        raise TuningError(f"{task.model_name} is a masked language model, which writes no texts: take how='edits'.")
    rows, draw = solved_rows(task, data), random.Random(seed)
    shown = draw.sample(rows, min(SHOWN, len(rows)))
    fields = Template(template).fields
    inputs = [" ".join(str(row[name]) for name in fields) for row, _ in shown]
    told = "\n\n".join(f"Input: {one}\nOutput: {two}" for one, (_, two) in zip(inputs, shown, strict=True))
    texts = (text.splitlines() for text in write_after(task, _ASKED.replace("{pairs}", told), most, _LONGEST, seed))
    said = dict.fromkeys(lines[0].strip().replace("{", "{{").replace("}", "}}") for lines in texts if lines)
    return [f"{instruction}\n{template}" for instruction in said if instruction]


def write_after(task: PromptedTask, text: str, most: int, longest: int, seed: int) -> list[str]:
    """Return what the model of a task writes behind a text, so many times, of at most ``longest`` tokens.

    Of a text that leaves no room the beginning is left out.
    """
    longest = min(longest, task.room // 2)
    opening, closing = special_ids(task.tokenizer)
    ids = text_ids(task.tokenizer, text)[-(task.room - longest - 8) :]
    prompt = padded(task.tokenizer, task.lm, [[*opening, *ids, *(closing if task.lm == "seq2seq" else [])]])
    device = next(task.backbone.parameters()).device
    sampler = Sampler(task.tokenizer, task.lm, 0.9, 0, 0.9, 1.0, None)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        asked = prompt["input_ids"].to(device), prompt["attention_mask"].to(device)
        paths = sampler.write(task.backbone.eval(), *asked, longest, most)
    return [sampler.text(path).strip() for path in paths]
