"""Short inputs of zeros for models of texts, images and sounds."""

import math

import torch
from torch import Tensor, nn

from lightning_peft.core import structure


def empty_input_of(model: nn.Module) -> dict[str, Tensor]:
    """Return one short text, image or sound of zeros for a transformers model, by the names of its inputs."""
    config, name = structure.config_of(model), structure.main_input_of(model) or ""
    device = next(model.parameters()).device
    if name == "input_ids":
        return {name: torch.full((1, 16), 5, device=device)}
    if name == "pixel_values":
        height, width = structure.image_size(config) or (224, 224)
        image = {name: torch.zeros(1, structure.image_channels(config), height, width, device=device)}
        return patches_of(model) or image
    features = structure.setting(config, "feature_projection_input_dim")
    if features and name == "input_features":
        return {name: torch.zeros(1, 16, features, device=device)}
    shape = (1, structure.setting(config, "max_length") or 0, structure.setting(config, "num_mel_bins") or 0)
    return {name: torch.zeros(shape if all(shape) and name == "input_values" else (1, 4000), device=device)}


def patches_of(model: nn.Module) -> dict[str, Tensor]:
    """Return an image as a row of patches, with its shape, for a model that takes such, as SigLIP 2 does; else none."""
    takes = structure.arguments_of(model)
    config = structure.config_of(model)
    config = structure.setting(config, "vision_config") or config
    count, patch = structure.setting(config, "num_patches"), structure.setting(config, "patch_size")
    if not {"pixel_values", "spatial_shapes"} <= {*takes} or not isinstance(count, int) or not isinstance(patch, int):
        return {}
    device, side = next(model.parameters()).device, math.isqrt(count)
    mask = next(name for name in ("pixel_attention_mask", "attention_mask") if name in takes)
    return {
        "pixel_values": torch.zeros(1, count, structure.image_channels(config) * patch**2, device=device),
        mask: torch.ones(1, count, dtype=torch.long, device=device),
        "spatial_shapes": torch.tensor([[side, side]], device=device),
    }
