"""Prompts as text, without torch: templates, verbalizers, demonstrations, instructions, reasoning, encoding."""

from lightning_peft.prompting.demonstrations import balanced_rows, context, ordered, random_rows, within, written
from lightning_peft.prompting.instructions import Instructions, mixed, mixing_rates, over_templates
from lightning_peft.prompting.reasoning import (
    answer_trigger,
    extract_answer,
    first_stage,
    majority,
    second_stage,
    solved,
)
from lightning_peft.prompting.template import Template
from lightning_peft.prompting.template_parts import options_text
from lightning_peft.prompting.verbalizer import Verbalizer

__all__ = [
    "Instructions",
    "Template",
    "Verbalizer",
    "answer_trigger",
    "balanced_rows",
    "context",
    "extract_answer",
    "first_stage",
    "majority",
    "mixed",
    "mixing_rates",
    "options_text",
    "ordered",
    "over_templates",
    "random_rows",
    "second_stage",
    "solved",
    "within",
    "written",
]
