"""Reads what a backbone says of itself: configuration, sizes, tables, base model, each asked for here and nowhere else.

Nothing here changes a model, and no table lists architectures. What a model does not have is None, or an empty mapping.
"""

import inspect
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import graft_prefixes

NAME_OR_PATH = "_name_or_path"
"""The entry of a configuration for where a model was loaded from.

https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/configuration_utils.py
"""


def config_of(model: nn.Module) -> Any:
    """Return the configuration of a transformers model."""
    return getattr(model, "config", None)


def setting(config: Any, *names: str) -> Any:
    """Return the first of these entries that a configuration has a value for."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def settings_of(model: nn.Module) -> dict[str, Any]:
    """Return the configuration of a transformers model as plain values."""
    config = config_of(model)
    return config.to_dict() if hasattr(config, "to_dict") else {}


def may_drop(model: nn.Module) -> bool:
    """Tell whether the body of a model may have dropout in training: a transformers model says all its rates."""
    return not is_pretrained(model) or _has_rate(settings_of(model))


def _has_rate(settings: Mapping[str, Any]) -> bool:
    inner = any(_has_rate(value) for value in settings.values() if isinstance(value, Mapping))
    own = (value for name, value in settings.items() if re.match("(?!classif|summary).*drop", str(name)))
    return inner or any(isinstance(value, (int, float)) and value > 0 for value in own)


def name_or_path(model: nn.Module) -> str:
    """Return the folder or hub id that a model was loaded from, or ''."""
    return setting(config_of(model), NAME_OR_PATH) or ""


def attention_implementation(model: nn.Module) -> str | None:
    """Return the name of the function that a transformers model computes its attention by.

    https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/configuration_utils.py
    """
    return setting(config_of(model), "_attn_implementation")


def is_encoder_decoder(model: nn.Module) -> bool:
    """Tell whether a model encodes a source, and decodes a target from it."""
    return bool(setting(config_of(model), "is_encoder_decoder"))


def generates(model: nn.Module) -> bool:
    """Tell whether a model writes text."""
    can = getattr(model, "can_generate", None)
    return can is not None and bool(can())


def has_two_towers(model: nn.Module) -> bool:
    """Tell whether a model compares texts with what is no text, each with a tower of its own."""
    return hasattr(model, "get_text_features")


def encoder_of(backbone: nn.Module) -> nn.Module | None:
    """Return the encoder of an encoder-decoder of transformers, if it says what that is."""
    get = getattr(backbone, "get_encoder", None)
    encoder = get() if get is not None else None
    return encoder if isinstance(encoder, nn.Module) and is_pretrained(encoder) else None


def is_encoder(backbone: nn.Module) -> bool:
    """Tell whether a transformers model is an encoder whose first token ([CLS]) may be pooled."""
    config = config_of(backbone)
    if config is None or is_encoder_decoder(backbone) or setting(config, "is_decoder"):
        return False
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    return type(config) in MODEL_FOR_MASKED_LM_MAPPING


def width_of(model: nn.Module) -> int | None:
    """Return the size of a model's hidden states; of a model of text and images, that of the text."""
    config = config_of(model)
    return setting(config, "hidden_size") or setting(setting(config, "text_config"), "hidden_size")


def initializer_range(model: nn.Module) -> float:
    """Return the standard deviation that the weights of a model had at the start of its pretraining."""
    given = setting(config_of(model), "initializer_range")
    return 0.02 if given is None else given


def main_input_of(model: nn.Module) -> str | None:
    """Return the name of a transformers model's main input: ``input_ids``, ``pixel_values`` ..."""
    return getattr(model, "main_input_name", None)


def image_size(config: Any) -> tuple[int, int] | None:
    """Return the height and width [pixels] of the images that a model of this configuration takes."""
    size = setting(setting(config, "vision_config") or config, "image_size")
    return None if size is None else tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def image_channels(config: Any) -> int:
    """Return how many channels the images have that a model of this configuration takes; 3 if it does not say."""
    return setting(setting(config, "vision_config") or config, "num_channels") or 3


def arguments_of(module: nn.Module) -> list[str]:
    """Return the names of the arguments of a module's forward pass."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def part(model: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a dotted path below a model."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def base_model_of(backbone: nn.Module) -> nn.Module:
    """Return the model without a head that a transformers model is built around, or the model itself."""
    base = getattr(backbone, "base_model", None)
    return base if isinstance(base, nn.Module) else backbone


def is_pretrained(model: nn.Module) -> bool:
    """Tell whether a model is one of transformers."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def output_embeddings_of(backbone: nn.Module) -> nn.Module | None:
    """Return the layer by which a language model scores its words."""
    get = getattr(backbone, "get_output_embeddings", None)
    return get() if get is not None else None


def input_embeddings_of(backbone: nn.Module) -> nn.Module | None:
    """Return the layer by which a model embeds its main input."""
    get = getattr(backbone, "get_input_embeddings", None)
    try:
        layer = get() if get is not None else None
    except NotImplementedError:  # of several towers, that of the text has a table
        towers = pretrained_models(nn.ModuleList(backbone.children())).values()
        tables = [table for tower in towers if isinstance(table := input_embeddings_of(tower), nn.Embedding)]
        words = setting(setting(config_of(backbone), "text_config"), "vocab_size")
        tables += [m for m in backbone.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == words]
        return next(iter(tables), None)
    return layer if isinstance(layer, nn.Module) else None  # Perceiver's is a parameter


def gives_image_features(model: nn.Module) -> bool:
    """Tell whether a transformers model can be asked for what its text part gets of an image."""
    return hasattr(model, "get_image_features")


def image_features_of(model: nn.Module, pixel_values: torch.Tensor) -> Any:
    """Return what the text part of a model gets of an image."""
    out = model.get_image_features(pixel_values)  # type: ignore[operator]
    return getattr(out, "pooler_output", out)


def gives_feature_maps(model: nn.Module) -> bool:
    """Tell whether a model gives the hidden states of chosen blocks, as the Backbone classes of transformers do."""
    return hasattr(model, "out_features")


def out_features_of(module: nn.Module) -> int | None:
    """Return the size of the last dimension of a projection's output."""
    size = getattr(module, "out_features", None) or getattr(module, "nf", None)  # Conv1D of transformers says nf
    return size if isinstance(size, int) else None


def bias_of(module: nn.Module) -> Any:
    """Return the bias of a layer."""
    return getattr(module, "bias", None)


def row_scale_of(table: nn.Module) -> Any:
    """Return by what an embedding multiplies its rows: ``embed_scale`` of Gemma or BART in transformers, else 1."""
    return getattr(table, "embed_scale", 1)


def experts_of(module: nn.Module) -> set[int]:
    """Return how many experts a module may have by what it says: those of transformers have a ``num_experts``."""
    return {value for name, value in vars(module).items() if "expert" in name and type(value) is int}


def is_transposed(module: nn.Module) -> bool:
    """Tell whether a module has its stacked experts as [E, in, out], as some of transformers say that they have."""
    return bool(getattr(module, "is_transposed", False))


def computes_in_place(model: nn.Module) -> bool:
    """Tell whether a module of a model, such as ``nn.ReLU(inplace=True)``, overwrites its input."""
    return any(getattr(module, "inplace", False) for module in model.modules())


def recomputing(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose activations transformers computes anew in the backward pass."""
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]


def pretrained_models(module: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost transformers models in ``module`` by name; none can exist while transformers is unused."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return {}
    if isinstance(module, modeling.PreTrainedModel):
        return {"": module}
    found: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(child, modeling.PreTrainedModel) and not inside:
            found[name] = child
    return found


def other_word_tables(backbone: nn.Module) -> dict[str, nn.Embedding]:
    """Return the further tables that give each word a row, such as those of single layers, by name."""
    tables = word_tables(backbone)
    words = len(next(iter(tables.values())).weight)  # type: ignore[arg-type]
    added = graft_prefixes(backbone)
    named = {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Embedding) and name not in tables and module.num_embeddings > 0.9 * words
    }
    return {
        name: module
        for name, module in named.items()
        if not re.search(r"position|wpe|token_type", name) and not name.startswith(added)
    }


def word_tables(backbone: nn.Module) -> dict[str, nn.Module]:
    """Return the input embedding and its tied twins by name (T5 has three).

    Raises:
        TuningError: the backbone has no input embedding.
    """
    words = setting(setting(config_of(backbone), "text_config") or config_of(backbone), "vocab_size")
    table = input_embeddings_of(backbone)
    if table is None:  # Perceiver embeds by what comes before it, for each kind of input another
        table = next((m for m in backbone.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == words), None)
    if table is None or not _is_table(table, words):
        raise TuningError(
            f"{type(backbone).__name__} has no table of word embeddings that it says is one, which soft prompts and "
            "trained tokens need: take a text model, or give it a method get_input_embeddings that returns the table."
        )
    return {
        name: module
        for name, module in backbone.named_modules()
        if _is_table(module, words) and module.weight is table.weight
    }


def _is_table(module: nn.Module, words: int | None) -> bool:
    """Tell whether a module embeds ids: an embedding, or a layer of its own class with a row for each word (I-BERT)."""
    if isinstance(module, nn.Embedding):
        return True
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.ndim == 2 and len(weight) == words and out_features_of(module) is None
