"""Prompt-Tuning: ``prompt_embeddings`` [P, d], in an encoder before its first token."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_peft.core import structure, text_structure
from lightning_peft.core.errors import TuningError
from lightning_peft.interop.converters.base import Converter, Exported, Parts, delta_name, graft_tensors, places
from lightning_peft.interop.names import Names
from lightning_peft.interop.task_types import prompt_task_of
from lightning_peft.methods.p_tuning import PTuning
from lightning_peft.methods.prompt_tuning import PromptTuning
from lightning_peft.prompts.virtual_tokens import PromptRows

TENSOR = "prompt_embeddings"
PROMPT_KEYS: Mapping[str, Any] = {
    "num_attention_heads": None,
    "num_layers": None,
    "num_transformer_submodules": 1,
    "num_virtual_tokens": None,
    "token_dim": None,
}
"""What PEFT writes for every prompt, with its default."""


class PromptConverter(Converter):
    """The rows of the prompt, before the input embeddings on both sides."""

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    methods: ClassVar[tuple[str, ...]] = ("PromptTuning",)
    defaults: ClassVar[Mapping[str, Any]] = {
        **PROMPT_KEYS,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }
    is_prompt: ClassVar[bool] = True

    def export(self, model: nn.Module, method: Any, names: Names) -> Exported:
        """Return the rows of the prompt."""
        check_place(model)
        if structure.is_encoder(model) and not method.before_cls:
            raise TuningError(
                f"PEFT puts a prompt before [CLS], so that {type(model).__name__} pools a virtual token, and this one "
                "comes after [CLS]: the same rows would compute something else, so train with before_cls=True."
            )
        if isinstance(method, PromptTuning) and method.num_prompts != 1:
            raise TuningError(f"an adapter of PEFT has one prompt, and this {type(method).__name__} has several.")
        if isinstance(method, PTuning) and (method.template is not None or method.tune_backbone):
            raise TuningError("a prompt of PEFT stands at the front of a frozen model: train without a template.")
        rows: Tensor = method.rows(model)
        config = model_settings(model) | {"num_virtual_tokens": rows.shape[0], "token_dim": rows.shape[1]}
        delta = {name for place in places(model, method) for name in graft_tensors(place)}
        return Exported(config, bare={TENSOR: rows}, delta=delta)

    def arguments(self, parts: Parts, names: Names) -> dict[str, Any]:
        """Return the length of the prompt, and where it is."""
        check_place(names.model)
        front = {"before_cls": True} if structure.is_encoder(names.model) else {}
        return {"num_virtual_tokens": prompt_rows(parts).shape[0], "init": "random_uniform"} | front

    def fill(self, parts: Parts, model: nn.Module, method: Any) -> dict[str, Tensor]:
        """Return the rows by their name in the delta, in which tied tables have them once."""
        first = next(place for place in places(model, method) if isinstance(place.graft, PromptRows))
        ((name, _),) = first.graft.named_parameters()
        return {delta_name(first, name): prompt_rows(parts)}


class PTuningConverter(PromptConverter):
    """P-Tuning: the rows that its encoder gives; PEFT keeps no encoder, so none comes back."""

    peft_type: ClassVar[str] = "P_TUNING"
    methods: ClassVar[tuple[str, ...]] = ("PTuning",)
    defaults: ClassVar[Mapping[str, Any]] = {
        **PROMPT_KEYS,
        "encoder_dropout": 0.0,
        "encoder_hidden_size": None,
        "encoder_num_layers": 2,
        "encoder_reparameterization_type": "MLP",
    }

    def arguments(self, parts: Parts, names: Names) -> dict[str, Any]:
        """Return the length of the prompt."""
        return super().arguments(parts, names) | {"encoder": "none", "init": "random"}


def check_place(model: nn.Module) -> None:
    """Check that PEFT puts the prompt where it is here.

    Raises:
        TuningError: the model has no text as its source, or PEFT has no class for its task.
    """
    if text_structure.target_decoder_of(model) is not None:
        raise TuningError(
            f"PEFT puts a prompt into the source, which is no text in {type(model).__name__}, and here it comes before "
            "the target: keep the delta."
        )
    if prompt_task_of(model) is None:
        raise TuningError(f"PEFT has no task type for {type(model).__name__}, which its prompts need: keep the delta.")


def model_settings(model: nn.Module) -> dict[str, Any]:
    """Return the settings of the model that PEFT writes into the configuration of a prompt."""
    config = structure.config_of(model).get_text_config()
    return {"num_attention_heads": config.num_attention_heads, "num_layers": config.num_hidden_layers}


def prompt_rows(parts: Parts) -> Tensor:
    """Return the rows that reach the input, [P, d].

    For an encoder-decoder PEFT makes rows for the decoder, too, which nothing reads.

    Raises:
        TuningError: there are none, or not as many as the configuration says.
    """
    rows, count = parts.bare.get(TENSOR), parts.config["num_virtual_tokens"]
    if rows is None:
        raise TuningError(f"{parts.source} lacks {TENSOR}: take another copy of the adapter.")
    expected = [count * (parts.config["num_transformer_submodules"] or 1), parts.config["token_dim"]]
    if list(rows.shape) != expected:
        raise TuningError(
            f"{parts.source} has {TENSOR} of shape {list(rows.shape)}, its configuration says {expected}: "
            "take another copy of the adapter."
        )
    return rows[:count]
