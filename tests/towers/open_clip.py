"""CLIP as open_clip writes it, with its names and torch's own attention: https://github.com/mlfoundations/open_clip."""

import copy

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A block of either tower."""

    def __init__(self, layer: nn.Module, dim: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2, self.mlp = layer.layer_norm1, layer.layer_norm2, layer.mlp
        self.attn, own = nn.MultiheadAttention(dim, heads, batch_first=True), layer.self_attn
        with torch.no_grad():
            for kind in ("weight", "bias"):
                parts = [getattr(part, kind) for part in (own.q_proj, own.k_proj, own.v_proj)]
                getattr(self.attn, f"in_proj_{kind}").copy_(torch.cat(parts))
                getattr(self.attn.out_proj, kind).copy_(getattr(own.out_proj, kind))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class OfImages(nn.Module):
    """The image side."""

    def __init__(self, vision: nn.Module) -> None:
        super().__init__()
        config, vision = vision.config, copy.deepcopy(vision)
        dim = config.hidden_size
        self.image_size = (config.image_size, config.image_size)
        self.conv1 = nn.Conv2d(3, dim, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(vision.embeddings.class_embedding.detach().clone())
        self.positional_embedding = nn.Parameter(vision.embeddings.position_embedding.weight.detach().clone())
        self.ln_pre, self.ln_post = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.resblocks = nn.ModuleList(Block(layer, dim, config.num_attention_heads) for layer in vision.encoder.layers)
        self.conv1.load_state_dict(vision.embeddings.patch_embedding.state_dict())
        self.ln_pre.load_state_dict(vision.pre_layrnorm.state_dict())
        self.ln_post.load_state_dict(vision.post_layernorm.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_embedding.expand(len(x), 1, -1), x), 1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.resblocks:
            x = block(x)
        return self.ln_post(x[:, 0])


class OpenCLIP(nn.Module):
    """Both sides; texts are read at the largest id, or at the last position."""

    def __init__(self, clip: nn.Module, pool: str = "argmax") -> None:
        super().__init__()
        text = copy.deepcopy(clip.text_model)
        count, self.pool = clip.config.text_config.max_position_embeddings, pool
        heads, dim = clip.config.text_config.num_attention_heads, clip.config.text_config.hidden_size
        self.visual = OfImages(clip.vision_model)
        self.visual.proj = nn.Parameter(clip.visual_projection.weight.detach().t().clone())
        self.token_embedding, self.ln_final = text.embeddings.token_embedding, text.final_layer_norm
        self.positional_embedding = nn.Parameter(text.embeddings.position_embedding.weight.detach().clone())
        self.resblocks = nn.ModuleList(Block(layer, dim, heads) for layer in text.encoder.layers)
        self.text_projection = nn.Parameter(clip.text_projection.weight.detach().t().clone())
        self.logit_scale = nn.Parameter(clip.logit_scale.detach().clone())
        self.register_buffer("attn_mask", torch.full((count, count), float("-inf")).triu(1), persistent=False)

    def encode_image(self, image: Tensor) -> Tensor:
        return self.visual(image) @ self.visual.proj

    def encode_text(self, text: Tensor) -> Tensor:
        x = self.token_embedding(text) + self.positional_embedding
        for block in self.resblocks:
            x = block(x, self.attn_mask)
        x = self.ln_final(x)
        x = x[torch.arange(len(x)), text.argmax(-1)] if self.pool == "argmax" else x[:, -1]
        return x @ self.text_projection
