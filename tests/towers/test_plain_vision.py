"""VPT in a vision transformer of one's own is what it is in transformers' model of the same weights."""

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import L2P, VPT, TuningError
from lightning_peft.core.meta_run import ran
from lightning_peft.towers.plain_vision import plain_tower
from tests.models import tiny
from tests.towers.open_clip import OfImages

P = 3


class Attention(nn.Module):
    """Turns the tokens of patches alone, as timm's attention with rotary positions does."""

    def __init__(self, dim: int, turns: bool) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.num_prefix_tokens, self.turns = 1, turns

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        if self.turns:
            n = self.num_prefix_tokens
            q, k = (torch.cat((t[:, :, :n], t[:, :, n:] * turn), 2) for t in (q, k))
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, turns: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-12), nn.LayerNorm(dim, eps=1e-12)
        self.attn = Attention(dim, turns)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), turn)
        return x + self.mlp(self.norm2(x))


class PlainViT(nn.Module):
    """A vision transformer as one writes it, with timm's names."""

    def __init__(self, dim: int = 32, size: int = 16, patch: int = 8, classes: int = 3, turns: bool = False) -> None:
        super().__init__()
        count = (size // patch) ** 2
        self.patch_embed = nn.Conv2d(3, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, count + 1, dim))
        self.pos_drop = nn.Dropout(0.0)
        self.blocks = nn.ModuleList(Block(dim, turns) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-12), nn.Linear(dim, classes)
        self.register_buffer("turn", torch.rand(count, dim // 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = self.pos_drop(torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1) + self.pos_embed)
        for block in self.blocks:
            x = block(x, self.turn)
        return self.head(self.norm(x)[:, 0])


def of_same_weights() -> tuple[nn.Module, PlainViT]:
    theirs, own = tiny("vit"), PlainViT(patch=tiny("vit").config.patch_size).eval()
    given = {f"vit.{n}": p for n, p in theirs.vit.named_parameters()} | dict(theirs.classifier.named_parameters())
    with torch.no_grad():
        own.cls_token.copy_(given["vit.embeddings.cls_token"])
        own.pos_embed.copy_(given["vit.embeddings.position_embeddings"])
        own.patch_embed.load_state_dict(theirs.vit.embeddings.patch_embeddings.projection.state_dict())
        own.norm.load_state_dict(theirs.vit.layernorm.state_dict())
        own.head.load_state_dict(theirs.classifier.state_dict())
        for block, layer in zip(own.blocks, theirs.vit.layers, strict=True):
            names = dict(layer.named_modules())
            block.norm1.load_state_dict(names["layernorm_before"].state_dict())
            block.norm2.load_state_dict(names["layernorm_after"].state_dict())
            found = {n.rsplit(".", 1)[-1]: m for n, m in names.items() if isinstance(m, nn.Linear)}
            for kind in ("weight", "bias"):
                parts = [getattr(found[n], kind) for n in ("q_proj", "k_proj", "v_proj")]
                getattr(block.attn.qkv, kind).copy_(torch.cat(parts))
            block.attn.proj.load_state_dict(found["o_proj"].state_dict())
            block.mlp[0].load_state_dict(found["fc1"].state_dict())
            block.mlp[2].load_state_dict(found["fc2"].state_dict())
    return theirs, own


def with_equal_prompts(one: nn.Module, other: nn.Module, **arguments: object) -> None:
    methods = [VPT(num_virtual_tokens=P, dropout=0.0, **arguments) for _ in range(2)]
    for method, model in zip(methods, (one, other), strict=True):
        method.apply(model)
    for prompt, twin in zip(methods[0].prompts(one), methods[1].prompts(other), strict=True):
        twin.data.copy_(prompt.data.normal_(0, 1.0))


@pytest.mark.parametrize("arguments", [{}, {"deep": False}, {"num_deep_layers": 1, "deep_from": "top"}])
def test_prompts_in_a_model_of_ones_own_are_those_in_transformers(arguments: dict[str, object]) -> None:
    theirs, own = of_same_weights()
    image = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(own(image), theirs(image).logits, atol=1e-5, rtol=1e-5)
        with_equal_prompts(theirs, own, **arguments)
        torch.testing.assert_close(own(image), theirs(image).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("deep", [True, False])
def test_prompts_in_a_clip_of_other_names_are_those_in_transformers(deep: bool) -> None:
    """They go in before the first norm, as there."""
    theirs = tiny("clip").base_model
    own = OfImages(tiny("clip").base_model.vision_model).eval()
    image = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        with_equal_prompts(theirs, own, deep=deep)
        expected = theirs.vision_model(pixel_values=image).pooler_output
        torch.testing.assert_close(own(image), expected, atol=1e-5, rtol=1e-5)


def test_what_turns_patches_leaves_prompts_unturned_and_is_given_back() -> None:
    model = PlainViT(turns=True).eval()
    image = torch.randn(2, 3, 16, 16)
    before, method = model(image), VPT(num_virtual_tokens=P, dropout=0.0)
    method.apply(model)
    model(image).sum().backward()
    assert all(bool(prompt.grad.abs().sum()) for prompt in method.prompts(model))
    assert [block.attn.num_prefix_tokens for block in model.blocks] == [1, 1]
    method.remove(model)
    assert torch.equal(model(image), before)


def test_it_is_found_below_a_module_and_beside_another_method() -> None:
    module = nn.ModuleDict({"model": PlainViT(), "other": nn.Linear(2, 2)})
    first = plain_tower(module)
    VPT(num_virtual_tokens=P, backbone="model").apply(module)
    found = plain_tower(module)
    assert first is not None
    assert found is not None
    assert found.module is module["model"]
    assert (found.tokens, found.shape, found.entry) == (first.tokens, first.shape, module["model"].pos_drop)


class Folding(PlainViT):
    """Its blocks see a picture in their tokens."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        for block in self.blocks:
            x = block(x.unflatten(1, (2, 2)).flatten(1, 2), self.turn)
        return self.head(self.norm(x).mean(1))


@pytest.mark.parametrize("model", [Folding(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), nn.Linear(2, 2)])
def test_a_model_without_a_row_of_tokens_is_refused(model: nn.Module) -> None:
    with pytest.raises(TuningError, match="has no vision transformer"):
        VPT().apply(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_needs_a_transformers_model_says_so() -> None:
    with pytest.raises(TuningError, match="pool='cls' is for a transformers classifier"):
        VPT(pool="cls").apply(PlainViT())
    with pytest.raises(TuningError, match="no learned positions to copy: take layout='prepend'"):
        L2P(layout="after_cls").apply(PlainViT())


@pytest.mark.parametrize("arguments", [{}, {"batchwise": "train", "cache_queries": True}])
def test_a_pool_in_a_model_of_ones_own_is_that_in_transformers(arguments: dict[str, object]) -> None:
    theirs, own = of_same_weights()
    image = torch.randn(4, 3, 16, 16)
    before, names = own(image), list(own.state_dict())
    methods = [L2P(pool_size=6, prompt_length=2, top_n=2, **arguments) for _ in range(2)]
    for method, model in zip(methods, (theirs, own), strict=True):
        method.apply(model)
    pools = [method.pool(model) for method, model in zip(methods, (theirs, own), strict=True)]
    pools[1].load_state_dict(pools[0].state_dict())
    for _ in range(2):
        torch.testing.assert_close(own(image), theirs(image).logits, atol=1e-5, rtol=1e-5)
        pulls = [method.penalty(model) for method, model in zip(methods, (theirs, own), strict=True)]
        torch.testing.assert_close(*pulls, atol=1e-5, rtol=1e-5)
    own(x=image).square().mean().backward()
    assert bool(pools[1].prompts.grad.abs().sum())
    methods[1].remove(own)
    assert list(own.state_dict()) == names
    assert torch.equal(own(image), before)


def test_a_pool_leaves_what_turns_patches_alone_in_the_pass_of_the_query() -> None:
    model, turned = PlainViT(turns=True).eval(), []
    method = L2P(pool_size=4, prompt_length=2, top_n=2)
    method.apply(model)
    model.blocks[1].attn.proj.register_forward_hook(
        lambda *args: turned.append((model.blocks[1].attn.num_prefix_tokens, args[1][0].shape[1]))
    )
    model(torch.randn(2, 3, 16, 16))
    assert turned == [(1, 5), (5, 9)]
    assert [block.attn.num_prefix_tokens for block in model.blocks] == [1, 1]


def test_a_run_without_numbers_puts_back_what_has_two_names() -> None:
    shared = nn.Linear(2, 2)
    part = nn.Sequential(shared, nn.Linear(2, 2), shared)
    part[1].weight = shared.weight
    before = dict(part.named_parameters())
    assert ran(part, torch.empty(1, 2, device="meta"))
    assert not ran(part, torch.empty(1, 3, device="meta"))
    after = dict(part.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert part[1].weight is shared.weight
