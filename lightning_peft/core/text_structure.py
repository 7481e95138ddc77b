"""Reads what the text part of a backbone is: its decoder, its positions, and how far back it sees.

As in `structure`, nothing is changed, and no table lists architectures.
"""

import re

from torch import Tensor, nn

from lightning_peft.core import structure


def text_decoder_of(backbone: nn.Module) -> nn.Module | None:
    """Return the causal decoder of a model without an encoder that takes a mask and positions, or None."""
    get = getattr(backbone, "get_decoder", None)
    if (
        structure.config_of(backbone) is None
        or structure.is_encoder_decoder(backbone)
        or structure.is_encoder(backbone)
        or get is None
    ):
        return None
    decoder = get()
    takes = structure.arguments_of(decoder) if isinstance(decoder, nn.Module) else []
    return decoder if {"attention_mask", "position_ids", "input_ids", "inputs_embeds"} <= set(takes) else None


def target_decoder_of(backbone: nn.Module) -> nn.Module | None:
    """Return the decoder of an encoder-decoder whose source is a sound or an image, and no text, or None."""
    takes = structure.arguments_of(backbone)
    if not structure.is_encoder_decoder(backbone) or "input_ids" in takes or "decoder_input_ids" not in takes:
        return None
    get = getattr(backbone, "get_decoder", None)
    decoder = get() if get is not None else None
    reads = structure.arguments_of(decoder) if isinstance(decoder, nn.Module) else []
    return decoder if {"input_ids", "encoder_hidden_states"} <= set(reads) else None


def window_of(model: nn.Module) -> int | None:
    """Return how many tokens back the text of a model is seen at most in some layer; None where all of it always is."""
    config = structure.config_of(model)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = set(structure.setting(config, "layer_types") or ())
    some = any("sliding" in kind or "chunked" in kind for kind in kinds) if kinds else True
    local = any("local" in kind for kind in structure.setting(config, "attention_layers") or ())
    names = ("window_size",) if local else ("sliding_window", "attention_chunk_size") if some else ()
    return structure.setting(config, *names)


def counts_positions(module: nn.Module) -> bool:
    """Tell whether a module, such as a rotary embedding, computes something of the positions of tokens alone."""
    return (
        not isinstance(module, nn.Embedding)
        and not list(module.children())
        and "position_ids" in structure.arguments_of(module)
    )


def cached_shape_of(attention: nn.Module) -> tuple[int, int] | None:
    """Return how many heads the keys and values of an attention have, and their size, where it says so."""
    heads, size = getattr(attention, "num_key_value_heads", None), getattr(attention, "head_dim", None)
    return (heads, size) if isinstance(heads, int) and isinstance(size, int) else None


def position_tables(backbone: nn.Module) -> dict[str, nn.Embedding]:
    """Return the learned position tables of the text part by name; those of patches and of sounds are left out."""
    return {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Embedding)
        and re.fullmatch(r"wpe|position_embeddings?|embed_positions", name.rsplit(".", 1)[-1])
        and _reads_text(backbone, name)
    }


def _reads_text(backbone: nn.Module, name: str) -> bool:
    """Tell whether the innermost module around a table that takes a model's input takes ids."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        takes = structure.arguments_of(backbone.get_submodule(".".join(parts[:depth])))
        if "input_ids" in takes or "pixel_values" in takes or "input_features" in takes or "input_values" in takes:
            return "input_ids" in takes
    return True


def max_positions(backbone: nn.Module) -> int | None:
    """Return the longest input [tokens] that a learned position table allows; None for relative or rotary positions."""
    # RoBERTa starts at padding_idx + 1, OPT and BART carry the same shift as `offset`.
    for table in position_tables(backbone).values():
        offset = table.padding_idx + 1 if table.padding_idx is not None else getattr(table, "offset", 0)
        return table.num_embeddings - offset
    return None


def encodes_pairs(model: nn.Module) -> bool:
    """Tell whether a model encodes texts and images by methods of open_clip's names."""
    return hasattr(model, "encode_text") and hasattr(model, "encode_image")


def encoded_texts(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the features of texts, [C, p], by the model's own method."""
    return model.encode_text(ids)  # type: ignore[operator]


def projected_text(owner: nn.Module, tokens: Tensor) -> Tensor:
    """Return the features of texts by the tokens at their ends, [C, p]: open_clip's projection is a matrix or layer."""
    projection = getattr(owner, "text_projection", None)
    if isinstance(projection, nn.Module):
        features: Tensor = projection(tokens)
        return features
    return tokens if projection is None else tokens @ projection.to(tokens.dtype)
