"""PEFT's names of tasks, and which models have which."""

from torch import nn

from lightning_peft.core import structure
from lightning_peft.core.task_class import is_headless

_TASKS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
}
AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""Task of an adapter -> the class of transformers that builds its model."""


def task_of(model: nn.Module) -> str | None:
    """Return PEFT's name for the task of a transformers model, or None: it has none for it."""
    from transformers.models.auto import modeling_auto

    for task, mapping in _TASKS.items():
        if type(model).__name__ in set(getattr(modeling_auto, mapping).values()):
            return task
    return None


def prompt_task_of(model: nn.Module) -> str | None:
    """Return PEFT's name for the task of a model that has a prompt, which may be one without a head."""
    bare = structure.is_pretrained(model) and structure.base_model_of(model) is model and is_headless(model)
    return task_of(model) or ("FEATURE_EXTRACTION" if bare else None)
