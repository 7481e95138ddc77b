"""CoOp in a two-tower model of open_clip's structure is what it is in transformers' CLIP of the same weights."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import CoOp, KgCoOp, TuningError, collect, muted
from lightning_peft.core.graft import grafts
from lightning_peft.towers.plain_text import plain_text
from tests.models import tiny
from tests.two_towers import written

M = 3


class Block(nn.Module):
    """A block as open_clip writes it, with torch's own attention."""

    def __init__(self, layer: nn.Module, dim: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2, self.mlp = layer.layer_norm1, layer.layer_norm2, layer.mlp
        self.attn, own = nn.MultiheadAttention(dim, heads, batch_first=True), layer.self_attn
        with torch.no_grad():
            for kind in ("weight", "bias"):
                parts = [getattr(part, kind) for part in (own.q_proj, own.k_proj, own.v_proj)]
                getattr(self.attn, f"in_proj_{kind}").copy_(torch.cat(parts))
                getattr(self.attn.out_proj, kind).copy_(getattr(own.out_proj, kind))

    def forward(self, x: Tensor, attn_mask: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class OpenCLIP(nn.Module):
    """The text side of open_clip's ``CLIP``, with its names: https://github.com/mlfoundations/open_clip."""

    def __init__(self, clip: nn.Module, pool: str = "argmax") -> None:
        super().__init__()
        text = copy.deepcopy(clip.text_model)
        count, self.pool = clip.config.text_config.max_position_embeddings, pool
        heads, dim = clip.config.text_config.num_attention_heads, clip.config.text_config.hidden_size
        self.token_embedding, self.ln_final = text.embeddings.token_embedding, text.final_layer_norm
        self.positional_embedding = nn.Parameter(text.embeddings.position_embedding.weight.detach().clone())
        self.resblocks = nn.ModuleList(Block(layer, dim, heads) for layer in text.encoder.layers)
        self.text_projection = nn.Parameter(clip.text_projection.weight.detach().t().clone())
        self.logit_scale = nn.Parameter(clip.logit_scale.detach().clone())
        self.register_buffer("attn_mask", torch.full((count, count), float("-inf")).triu(1), persistent=False)

    def encode_image(self, image: Tensor) -> Tensor:
        raise NotImplementedError

    def encode_text(self, text: Tensor) -> Tensor:
        x = self.token_embedding(text) + self.positional_embedding
        for block in self.resblocks:
            x = block(x, self.attn_mask)
        x = self.ln_final(x)
        x = x[torch.arange(len(x)), text.argmax(-1)] if self.pool == "argmax" else x[:, -1]
        return x @ self.text_projection


def models() -> tuple[nn.Module, OpenCLIP, Tensor]:
    """Return CLIP, the same with other names, and texts of as many tokens as it has positions."""
    clip = tiny("clip").base_model.eval()
    texts = written("clip", [], length=clip.config.text_config.max_position_embeddings)
    ends = texts.argmax(1, keepdim=True)
    own = OpenCLIP(clip).eval().requires_grad_(False)  # where weights learn, torch's attention takes another path
    return clip, own, torch.where(torch.arange(texts.shape[1]) > ends, 0, texts)


@pytest.mark.parametrize(
    "arguments", [{}, {"position": "middle"}, {"position": "front"}, {"class_specific": True, "num_classes": 3}]
)
def test_a_context_is_that_in_transformers(arguments: dict[str, object]) -> None:
    clip, own, texts = models()
    names = list(own.state_dict())
    with torch.no_grad():
        before = own.encode_text(texts)
    torch.testing.assert_close(before, clip.get_text_features(texts).pooler_output, atol=1e-5, rtol=1e-5)
    methods = [CoOp(num_virtual_tokens=M, **arguments) for _ in range(2)]
    for method, model in zip(methods, (clip, own), strict=True):
        method.apply(model)
    methods[0].context(clip).data.copy_(methods[1].context(own).data.normal_())
    features = own.encode_text(texts)
    torch.testing.assert_close(features, clip.get_text_features(texts).pooler_output, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(features, before, atol=1e-2)
    features.sum().backward()
    assert bool(own.token_embedding.coop.weight.grad.abs().sum())
    assert [name for name, p in own.named_parameters() if p.requires_grad] == ["token_embedding.coop.weight"]
    assert list(collect(own)) == ["token_embedding.coop.weight"]
    with muted(own), torch.no_grad():
        assert torch.equal(own.encode_text(texts), before)
    methods[1].remove(own)
    assert list(own.state_dict()) == names
    with torch.no_grad():
        assert torch.equal(own.encode_text(texts), before)


def test_it_is_found_below_a_module_and_has_room_for_so_much() -> None:
    _, own, texts = models()
    module = nn.ModuleDict({"model": own, "other": nn.Linear(2, 2)})
    found = plain_text(module)
    assert found is not None
    assert (found.model, found.table, found.norm) == (own, own.token_embedding, own.ln_final)
    CoOp(num_virtual_tokens=found.positions - 1).apply(module)
    with pytest.raises(TuningError, match="shorten the text or the context"):
        own.encode_text(texts)


@pytest.mark.parametrize(("method", "message"), [
    (CoOp(), "does not read a text at its end"), (KgCoOp(), "no text tower like that of CLIP or SigLIP"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(method: CoOp, message: str) -> None:
    own = OpenCLIP(models()[0], pool="last" if type(method) is CoOp else "argmax")
    with pytest.raises(TuningError, match=message):
        method.apply(own)
    assert not list(grafts(own))
    assert own.training
