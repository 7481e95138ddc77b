"""Reads what the image part of a model says of itself, in whatever package it was written."""

from torch import nn

from lightning_peft.core import structure


def stated_image_size(model: nn.Module) -> tuple[int, int] | None:
    """Return the height and width [pixels] of images that some module of a model says it takes."""
    for module in (structure.config_of(model), *model.modules()):
        size = structure.setting(module, "img_size", "image_size", "input_resolution")
        if size is None and structure.setting(module, "patch_size"):  # as LayoutLMv3's configuration has it
            size = structure.setting(module, "input_size")
        pair = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        if len(pair) == 2 and all(isinstance(number, int) for number in pair):
            return pair
    return None


def frames_of(model: nn.Module) -> int | None:
    """Return how many frames the videos have that a model takes."""
    return structure.setting(structure.config_of(model), "num_frames") or structure.setting(model, "num_frames")


def prefix_tokens_of(module: nn.Module) -> int | None:
    """Return how many tokens before those of the patches an attention leaves unturned, where it says so."""
    return structure.setting(module, "num_prefix_tokens")
