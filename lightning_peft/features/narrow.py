"""Builds a narrow copy of a transformers model: its class, with random weights and smaller sizes."""

import contextlib
import copy
import inspect
import math
from typing import Any

import torch
from torch import nn

from lightning_peft.core import structure
from lightning_peft.core.errors import TuningError

_INNER = ("intermediate_size", "hidden_dim", "ffn_dim", "encoder_ffn_dim", "d_ff", "n_inner")
_AS_WIDE = ("embedding_size", "word_embed_proj_dim", "attention_hidden_size")


def narrow(base: nn.Module, reduction: int, layers: int | None, pooled: bool) -> tuple[nn.Module, tuple[int, int]]:
    """Return a copy of a transformers model with random weights and smaller sizes, and both widths.

    Raises:
        TuningError: the model is none of transformers, or its class refuses such sizes.
    """
    config = copy.deepcopy(structure.config_of(base))
    if config is None:
        raise TuningError(f"{type(base).__name__} has no config to build a narrow copy by: give side= (a class path).")
    try:
        widths = _shrink(config, reduction)
        if layers is not None:
            if layers > config.num_hidden_layers:
                raise ValueError(f"it has {config.num_hidden_layers} blocks")
            config.num_hidden_layers = layers
            if structure.setting(config, "layer_types"):
                config.layer_types = config.layer_types[:layers]
        options = (
            {"add_pooling_layer": pooled} if "add_pooling_layer" in inspect.signature(type(base)).parameters else {}
        )
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            network = type(base)(config, **options)
        finally:
            torch.set_default_dtype(dtype)
    except (TypeError, ValueError, AttributeError, RuntimeError, ZeroDivisionError, AssertionError, KeyError) as error:
        why = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise TuningError(
            f"no narrow copy of {type(base).__name__} can be built with reduction={reduction}, side_layers={layers} "
            f"({why}): choose others, or give side= (a class path)."
        ) from None
    return network, widths


def _shrink(config: Any, reduction: int) -> tuple[int, int]:
    """Divide the sizes in a config; return the narrow and the full width."""
    if structure.setting(config, "hidden_sizes"):
        return _shrink_convolutions(config, reduction)
    if structure.setting(config, "text_config"):
        return _shrink_parts(config, reduction)
    if isinstance(structure.setting(config, "num_heads"), (list, tuple)) and structure.setting(config, "embed_dim"):
        return _shrink_stages(config, reduction)
    full, heads = config.hidden_size, structure.setting(config, "num_attention_heads") or 1
    few = max(1, heads // reduction)
    width = max(1, full // reduction // few) * few
    sizes = {"num_key_value_heads": max(1, (structure.setting(config, "num_key_value_heads") or 1) * few // heads)}
    sizes |= {"head_dim": width // few, "num_attention_heads": few, "hidden_size": width}
    sizes |= {name: width for name in _AS_WIDE if structure.setting(config, name) == full}
    for name in _INNER:
        size = structure.setting(config, name)
        if isinstance(size, int):
            setattr(config, name, max(1, size // reduction))
    for name, size in sizes.items():
        if structure.setting(config, name) is not None:
            with contextlib.suppress(AttributeError):  # Falcon computes the size of its heads
                setattr(config, name, size)
    return width, full


def _shrink_convolutions(config: Any, reduction: int) -> tuple[int, int]:
    """Divide the sizes of a convolutional network in stages."""
    full = config.hidden_sizes[-1]
    config.hidden_sizes = [max(1, size // reduction) for size in config.hidden_sizes]
    if structure.setting(config, "embedding_size"):
        config.embedding_size = max(1, config.embedding_size // reduction)
    return config.hidden_sizes[-1], full


def _shrink_parts(config: Any, reduction: int) -> tuple[int, int]:
    """Divide the sizes of a model of text and of images or sounds, whose width is that of the text."""
    width, full = _shrink(config.text_config, reduction)
    for part in ("vision_config", "audio_config"):
        if structure.setting(config, part):
            _shrink(structure.setting(config, part), reduction)
    for whole in (config, structure.setting(config, "vision_config")):
        if structure.setting(whole, "projection_dim") == full:
            whole.projection_dim = width
    return width, full


def _shrink_stages(config: Any, reduction: int) -> tuple[int, int]:
    """Divide the sizes of a transformer in stages, each twice as wide as the one before."""
    full = config.hidden_size
    config.num_heads = [max(1, heads // reduction) for heads in config.num_heads]
    every = math.lcm(*(heads // math.gcd(heads, 2**i) for i, heads in enumerate(config.num_heads)))
    config.embed_dim = max(1, config.embed_dim // reduction // every) * every
    config.hidden_size = config.embed_dim * 2 ** (len(config.num_heads) - 1)
    return config.hidden_size, full
