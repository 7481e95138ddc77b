"""The kinds of methods, as tables list them."""

from typing import TYPE_CHECKING

from lightning_peft.methods import every_method

if TYPE_CHECKING:
    from lightning_peft.training.method import Method

WHEN: dict[str, str] = {
    "weights": "the default: near full fine-tuning on most tasks, and free at inference once it is merged",
    "biases": "few rows, small deltas; also where weights must stay as they are",
    "activations": "the smallest delta of those that change every block",
    "modules": "several tasks in one model; costs time at inference",
    "prefix": "tasks of writing, and prompts for deep models; needs higher learning rates and more steps",
    "mask": "a decoder that reads a source before it writes; beside any other method",
    "words": "new words, such as the marks of a chat template; beside any other method",
    "prompt": "very large models, images and CLIP; one frozen model answers rows of many tasks in one batch",
    "head": "the baseline of every frozen model, and the fastest, with `cache_features`",
    "blocks": "between the head alone and the whole model",
    "side network": "no backward pass through the backbone: the least memory",
    "all": "the baseline that all others are measured against",
}
"""Kind of a method -> when to take one; in the order of the tables."""


def by_kind() -> "dict[str, dict[str, type[Method]]]":
    """Return the methods of each kind by name; kinds that `WHEN` does not name come last."""
    every = every_method()
    kinds = dict.fromkeys([*WHEN, *(method.kind for method in every.values())])
    return {kind: {name: method for name, method in every.items() if method.kind == kind} for kind in kinds}
