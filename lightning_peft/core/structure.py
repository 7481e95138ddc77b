"""Reads what a backbone is: configuration, sizes, tables, blocks and head, each asked for here and nowhere else.

Nothing here changes a model, and no table lists architectures: what a model says of itself is read, and a block is an
entry of an outermost list of equal modules. What a model does not have is None, or an empty mapping.
"""

import inspect
import re
import sys
from typing import Any

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


def output_embeddings_of(backbone: nn.Module) -> nn.Module | None:
    """Return the layer by which a language model scores its words."""
    get = getattr(backbone, "get_output_embeddings", None)
    return get() if get is not None else None


def input_embeddings_of(backbone: nn.Module) -> nn.Module | None:
    """Return the layer by which a model embeds its main input."""
    get = getattr(backbone, "get_input_embeddings", None)
    try:
        return get() if get is not None else None
    except NotImplementedError:  # of several towers, that of the text has a table
        towers = pretrained_models(nn.ModuleList(backbone.children())).values()
        return next((e for tower in towers if isinstance(e := input_embeddings_of(tower), nn.Embedding)), None)


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
    found: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        inside = any(name.startswith(f"{outer}.") or outer == "" for outer in found)
        if isinstance(child, modeling.PreTrainedModel) and not inside:
            found[name] = child
    return found


def block_lists(backbone: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the outermost lists of equal modules by name: ``encoder.layer``, or T5's two lists ``*.block``."""
    lists: dict[str, nn.ModuleList] = {}
    added = graft_prefixes(backbone)
    for name, module in backbone.named_modules():
        if not isinstance(module, nn.ModuleList) or name.startswith((*(f"{outer}." for outer in lists), *added)):
            continue
        if len(module) > 0 and len({type(entry) for entry in module}) == 1:
            lists[name] = module
    return lists


def blocks(backbone: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
    """Return, for each of the ``block_lists``, its blocks in order, with their names; a stage counts as its blocks.

    A stage (Swin, ResNet) is an entry with a list ``blocks`` or ``layers`` of equal modules of its own.
    """
    found: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, entries in block_lists(backbone).items():
        found[name] = []
        for i, entry in enumerate(entries):
            children = dict(entry.named_children())
            leaf = "blocks" if "blocks" in children else "layers"
            inner = children.get(leaf)
            if isinstance(inner, (nn.ModuleList, nn.Sequential)) and len({type(block) for block in inner}) == 1:
                found[name] += [(f"{name}.{i}.{leaf}.{j}", block) for j, block in enumerate(inner)]
            else:
                found[name].append((f"{name}.{i}", entry))
    return found


def without_grafts(backbone: nn.Module) -> dict[str, nn.Module]:
    """Return all modules of a backbone by name, but for those that methods have added."""
    added = graft_prefixes(backbone)
    return {name: module for name, module in backbone.named_modules() if not f"{name}.".startswith(added)}


def norm_names(backbone: nn.Module) -> list[str]:
    """Return the parameter names of the norms that work on each token (LayerNorm, RMSNorm ...), the head's left out."""
    head = set(head_names(backbone))
    return [
        full
        for name, module in without_grafts(backbone).items()
        if "Norm" in type(module).__name__ and "BatchNorm" not in type(module).__name__
        for parameter, _ in module.named_parameters(recurse=False)
        if (full := f"{name}.{parameter}") not in head
    ]


def bias_owners(backbone: nn.Module) -> dict[str, str]:
    """Return the name of each module that has a bias, the head's left out, with the name of that bias."""
    head = set(head_names(backbone))
    return {
        name: full
        for name, module in without_grafts(backbone).items()
        for last, _ in module.named_parameters(recurse=False)
        if last in ("bias", "in_proj_bias") and (full := f"{name}.{last}".lstrip(".")) not in head
    }


def other_word_tables(backbone: nn.Module) -> dict[str, nn.Embedding]:
    """Return the further tables that give each word a row, such as those of single layers, by name."""
    tables = word_tables(backbone)
    words = int(next(iter(tables.values())).num_embeddings)  # type: ignore[arg-type]
    named = {
        name: module
        for name, module in without_grafts(backbone).items()
        if isinstance(module, nn.Embedding) and name not in tables and module.num_embeddings > 0.9 * words
    }
    return {name: module for name, module in named.items() if not re.search(r"position|wpe|token_type", name)}


def word_tables(backbone: nn.Module) -> dict[str, nn.Module]:
    """Return the input embedding and its tied twins by name (T5 has three).

    Raises:
        TuningError: the backbone has no input embedding.
    """
    table = input_embeddings_of(backbone)
    if not isinstance(table, nn.Embedding):
        raise TuningError(
            f"{type(backbone).__name__} has no table of word embeddings: a soft prompt needs a text model."
        )
    return {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Embedding) and module.weight is table.weight
    }


def head_names(backbone: nn.Module) -> list[str]:
    """Return the parameter names of the task head: what lies outside the base model of a model without an LM head.

    The head of a language model was pretrained with it, tied or not, so it is none: ``also_train`` can name it.
    """
    base: nn.Module | None = base_model_of(backbone)
    if base is backbone and type(backbone).__name__.endswith("ForImageClassification"):
        # CLIP's and SigLIP's classifiers name a base model that they do not have; what they have is its image side.
        base = next(iter(pretrained_models(nn.ModuleList(backbone.children())).values()), None)
    if base is None or base is backbone or output_embeddings_of(backbone) is not None:
        return []
    inside = {id(p) for p in base.parameters()}
    return [name for name, p in backbone.named_parameters() if id(p) not in inside]
