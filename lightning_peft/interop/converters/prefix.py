"""Prefix-Tuning and P-Tuning v2: ``prompt_embeddings`` [P, 2 L H d], the keys and values of all layers side by side."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_peft.core import text_structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Grafted
from lightning_peft.interop.converters.base import Converter, Exported, Parts, delta_name, graft_tensors, places
from lightning_peft.interop.converters.prompt import PROMPT_KEYS, TENSOR
from lightning_peft.interop.names import Names
from lightning_peft.interop.task_types import prompt_task_of
from lightning_peft.prompts.prefix import Prefix


class PrefixConverter(Converter):
    """Layer l has the keys ``[:, 2 l]`` and values ``[:, 2 l + 1]`` of the view [P, 2 L, H, d]; no network is kept."""

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    methods: ClassVar[tuple[str, ...]] = ("PrefixTuning", "PTuningV2")
    defaults: ClassVar[Mapping[str, Any]] = {
        **PROMPT_KEYS,
        "encoder_hidden_size": None,
        "init_weights": None,
        "prefix_projection": False,
    }
    is_prompt: ClassVar[bool] = True

    def method_of(self, parts: Parts) -> str:
        """Return P-Tuning v2 where there is a task head."""
        return "PrefixTuning" if parts.config["task_type"] == "CAUSAL_LM" else "PTuningV2"

    def export(self, model: nn.Module, method: Any, names: Names) -> Exported:
        """Return the keys and values of all layers."""
        _check_model(model)
        prefixes = _prefixes(model, method)
        rows = [place.graft.rows() for place in prefixes]
        if method.positions != "shifted":
            raise TuningError("PEFT counts the positions of the text from P: train with positions='shifted'.")
        layers = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
        if len(rows) != layers or len({t.shape for pair in rows for t in pair}) != 1:
            raise TuningError(
                f"PEFT gives each of the {layers} layers a prefix of one shape, and here {len(rows)} attentions have "
                "one: train without layers=."
            )
        heads, count, dim = rows[0][0].shape
        stacked = torch.stack([t.permute(1, 0, 2) for pair in rows for t in pair], dim=1)  # [P, 2 L, H, d]
        config = {
            "encoder_hidden_size": heads * dim,
            "num_attention_heads": heads,
            "num_layers": layers,
            "num_virtual_tokens": count,
            "token_dim": heads * dim,
        }
        delta = {name for place in places(model, method) for name in graft_tensors(place)}
        return Exported(config, bare={TENSOR: stacked.flatten(1)}, delta=delta)

    def arguments(self, parts: Parts, names: Names) -> dict[str, Any]:
        """Return the length of the prefix."""
        _check_model(names.model)
        table, count = parts.bare.get(TENSOR), parts.config["num_virtual_tokens"]
        width = 2 * parts.config["num_layers"] * parts.config["token_dim"]
        if table is None or list(table.shape) != [count, width]:
            shape = "none" if table is None else list(table.shape)
            raise TuningError(
                f"{parts.source} has {TENSOR} of shape {shape}, its configuration says {[count, width]}: "
                "take another copy of the adapter."
            )
        return {"num_virtual_tokens": count, "mid_dim": None}

    def fill(self, parts: Parts, model: nn.Module, method: Any) -> dict[str, Tensor]:
        """Return the keys and values by the names of the grafts."""
        prefixes = _prefixes(model, method)
        heads, count, dim = prefixes[0].graft.get_parameter("keys").shape
        table = parts.bare[TENSOR]
        if table.shape[1] != 2 * len(prefixes) * heads * dim:
            raise TuningError(
                f"{parts.source} has keys and values of {table.shape[1]} numbers, this model of "
                f"{2 * len(prefixes) * heads * dim}: it was made for another base."
            )
        view = table.view(count, 2 * len(prefixes), heads, dim).permute(1, 2, 0, 3)
        filled = {}
        for i, place in enumerate(prefixes):
            filled[delta_name(place, "keys")] = view[2 * i]
            filled[delta_name(place, "values")] = view[2 * i + 1]
        return filled


def _prefixes(model: nn.Module, method: Any) -> list[Grafted[Any]]:
    return [place for place in places(model, method) if isinstance(place.graft, Prefix)]


def _check_model(model: nn.Module) -> None:
    """Check that PEFT puts prefixes where they are here.

    Raises:
        TuningError: the model is an encoder-decoder, or has no task type.
    """
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        raise TuningError(
            f"a prefix of PEFT reaches the decoder of {type(model).__name__} alone, ours all its attentions: keep the "
            "delta."
        )
    if prompt_task_of(model) is None:
        raise TuningError(f"PEFT has no task type for {type(model).__name__}, which its prefixes need: keep the delta.")
    window = text_structure.window_of(model)
    if window is not None:
        rank_zero_warn(
            f"{type(model).__name__} sees {window} tokens back. In PEFT a prefix is out of sight behind them, here all "
            f"of a text sees it: the two are equal for texts that are shorter than {window} with their prefix."
        )
