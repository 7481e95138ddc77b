"""Prefixes and the infix against whole forward passes that are written out here, with nothing of ours in them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft import PrefixTuning
from lightning_peft.core.graft import grafts
from tests.contract import assert_near, shake
from tests.methods.test_prefix_tuning import model_of, prefixes, sourced, tokens
from tests.models import tiny

P = 3
Rows = tuple[Tensor, Tensor]


def attended(attention: nn.Module, x: Tensor, states: Tensor, prefix: Rows, causal: bool = False) -> Tensor:
    """Return what one attention of BART gives: softmax(q [P_k; k]^T / √d) [P_v; v]."""
    heads = attention.num_heads

    def split(t: Tensor) -> Tensor:
        return t.view(*t.shape[:2], heads, -1).transpose(1, 2)

    q, k, v = split(attention.q_proj(x)), split(attention.k_proj(states)), split(attention.v_proj(states))
    k, v = (torch.cat((rows.expand(len(x), -1, -1, -1), t), 2) for rows, t in zip(prefix, (k, v), strict=True))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    if causal:
        hidden = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        scores[..., P:] = scores[..., P:].masked_fill(hidden, -torch.inf)
    return attention.out_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


def bart(model: nn.Module, source: Tensor, target: Tensor, rows: dict[str, Rows]) -> Tensor:
    """Return the logits of BART with three sets of prefixes; positions of texts begin at 0, as in the authors' code."""

    def begin(stack: nn.Module, ids: Tensor) -> Tensor:
        places = stack.embed_positions.weight[2 : 2 + ids.shape[1]]  # BART leaves the first two rows out
        return stack.layernorm_embedding(model.model.shared.weight[ids] + places)

    def fed(layer: nn.Module, x: Tensor) -> Tensor:
        return layer.final_layer_norm(x + layer.fc2(F.gelu(layer.fc1(x))))

    encoder, decoder = model.model.encoder, model.model.decoder
    states = begin(encoder, source)
    for i, layer in enumerate(encoder.layers):
        own = rows[f"model.encoder.layers.{i}.self_attn"]
        states = layer.self_attn_layer_norm(states + attended(layer.self_attn, states, states, own))
        states = fed(layer, states)
    x = begin(decoder, target)
    for i, layer in enumerate(decoder.layers):
        own, cross = (rows[f"model.decoder.layers.{i}.{name}"] for name in ("self_attn", "encoder_attn"))
        x = layer.self_attn_layer_norm(x + attended(layer.self_attn, x, x, own, causal=True))
        x = layer.encoder_attn_layer_norm(x + attended(layer.encoder_attn, x, states, cross))
        x = fed(layer, x)
    return model.lm_head(x) + model.final_logits_bias


def test_three_sets_in_an_encoder_decoder() -> None:
    model, plain = model_of("bart"), model_of("bart")
    PrefixTuning(num_virtual_tokens=P, mid_dim=None, positions="unshifted").apply(model)
    shake(model, 0.5)
    source, target = tokens(), tokens(length=5, seed=1)
    rows = {path: (prefix.keys, prefix.values) for path, prefix in prefixes(model).items()}
    assert len(rows) == 2 + 2, "two blocks of the encoder, and two attentions of the one of the decoder"
    with torch.no_grad():
        found = model(input_ids=source, decoder_input_ids=target).logits
        assert_near({"": bart(plain, source, target, rows)}, {"": found}, 1e-5)
        assert not torch.allclose(found, plain(input_ids=source, decoder_input_ids=target).logits, atol=0.1)


def test_an_infix_changes_keys_and_values_of_its_tokens_alone() -> None:
    """[x; INFIX; y] through GPT-2, numbers added to what the projections of each layer give for the infix."""
    model, plain = tiny("gpt2"), tiny("gpt2")
    method = PrefixTuning(num_virtual_tokens=P, mid_dim=None, form="infix")
    method.apply(model)
    shake(model, 0.3)
    inputs = sourced("gpt2")
    ids = inputs["input_ids"]
    words = next(p.graft.weight for p in grafts(model) if hasattr(p.graft, "weight") and not hasattr(p.graft, "states"))
    added = [place.graft.states for place in grafts(model) if hasattr(place.graft, "states")]
    base = plain.transformer
    x = torch.cat((base.wte.weight[ids[:, :4]], words.expand(len(ids), -1, -1), base.wte.weight[ids[:, 4:]]), 1)
    x = x + base.wpe.weight[: x.shape[1]]
    hidden = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    with torch.no_grad():
        for block, states in zip(base.h, added, strict=True):
            q, k, v = block.attn.c_attn(block.ln_1(x)).chunk(3, -1)
            more = F.pad(states, (0, 0, 4, x.shape[1] - 4 - P))  # zeros for all other tokens
            k, v = (t + rows for t, rows in zip((k, v), more.chunk(2, -1), strict=True))
            q, k, v = (t.view(*t.shape[:2], block.attn.num_heads, -1).transpose(1, 2) for t in (q, k, v))
            scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
            x = x + block.attn.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))
            x = x + block.mlp(block.ln_2(x))
        expected = plain.lm_head(base.ln_f(x))
        found = model(**method.prepare(inputs)).logits
    assert_near({"": expected}, {"": found}, 1e-5)
