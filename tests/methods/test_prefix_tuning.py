"""PrefixTuning: keys and values before those of the text. Before a causal text, those of words are the words."""

from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft import LoRA, PrefixTuning, PromptTuning, TuningError, collect, load_delta, merge, save_delta
from lightning_peft.core import attention
from lightning_peft.core.graft import grafts
from lightning_peft.prompts.prefix import Prefix
from tests.contract import MethodContract, assert_near, assert_same, copy_of, output, shake, snapshot
from tests.models import HIDDEN, POSITIONS, VOCABULARY, batch, meta, save_tokenizer, tiny
from tests.modules import loader, trainer

P = 3
WORDS = "good film music people"
HEADS, DIM, SETS = 4, HIDDEN // 4, {"t5": 3}
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {name: _SMALL[name] for name in list(_SMALL)[1:6]} | {"image_size": 16, "patch_size": 4}


def other(kind: str) -> nn.Module:
    """Return models beside those of the contract."""
    torch.manual_seed(0)
    special = {"cls_token_id": 3, "sep_token_id": 4}
    builders = {
        "opt": lambda: hf.OPTForCausalLM(
            hf.OPTConfig(ffn_dim=64, word_embed_proj_dim=HIDDEN, max_position_embeddings=64, init_std=0.3, **_SMALL)
        ),
        "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(num_key_value_heads=2, **_SMALL)),
        "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_SMALL)),
        "albert": lambda: hf.AlbertForSequenceClassification(hf.AlbertConfig(embedding_size=16, **_SMALL)),
        "modernbert": lambda: hf.ModernBertForSequenceClassification(hf.ModernBertConfig(**special, **_SMALL)),
        "bart": lambda: hf.BartForConditionalGeneration(
            hf.BartConfig(
                vocab_size=VOCABULARY,
                d_model=HIDDEN,
                encoder_layers=2,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=2,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                max_position_embeddings=POSITIONS,
                init_std=0.3,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=2,
                forced_eos_token_id=None,
            )
        ),
        "clip": lambda: hf.CLIPModel(
            hf.CLIPConfig(text_config={**_SMALL, "max_position_embeddings": 77}, vision_config=_VISION)
        ),
        "mistral": lambda: hf.MistralForCausalLM(
            hf.MistralConfig(num_key_value_heads=2, sliding_window=None, **_SMALL)
        ),
    }
    return builders[kind]().eval()


def model_of(kind: str) -> nn.Module:
    return tiny(kind) if kind in ("bert", "distilbert", "gpt2", "llama", "t5", "vit") else other(kind)


def tokens(size: int = 2, length: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(5, VOCABULARY, (size, length), generator=torch.Generator().manual_seed(seed))


class TestPrefixTuning(MethodContract):
    method = PrefixTuning(num_virtual_tokens=P, mid_dim=5)
    backbones = ("bert", "gpt2", "llama", "t5", "vit")
    traces_backward = True
    identity_at_start = False
    compiled = ("bert", "llama")

    def count(self, kind: str) -> int:
        """The network of each set: P d + (d + 1) mid + (mid + 1) 2 L d."""
        width = 2 * 2 * (HIDDEN // 2 if kind == "llama" else HIDDEN)  # Llama's keys have half the heads
        return SETS.get(kind, 1) * (P * HIDDEN + (HIDDEN + 1) * 5 + (5 + 1) * width)


class TestDirect(MethodContract):
    method = PrefixTuning(num_virtual_tokens=P, mid_dim=None)
    backbones = ("distilbert", "t5")
    identity_at_start = False
    compiled = ("distilbert",)

    def count(self, kind: str) -> int:
        """2 L P d for each set."""
        return SETS.get(kind, 1) * P * 2 * 2 * HIDDEN


class TestInfix(MethodContract):
    method = PrefixTuning(num_virtual_tokens=P, mid_dim=None, form="infix")
    backbones = ("gpt2", "llama")
    identity_at_start = False
    takes_pairs = False
    compiled = ("gpt2",)

    def count(self, kind: str) -> int:
        """P d in the word table, 2 L P d in the keys and values."""
        return P * HIDDEN + P * 2 * 2 * (HIDDEN // 2 if kind == "llama" else HIDDEN)


@pytest.mark.parametrize(
    ("config", "auto", "length", "mid", "trained", "saved"),
    [
        (hf.GPT2Config(n_embd=1024, n_layer=24, n_head=16), hf.AutoModelForCausalLM, 5, 512, 25_744_896, 245_760),
        (hf.GPT2Config(n_embd=1024, n_layer=24, n_head=16), hf.AutoModelForCausalLM, 10, None, 491_520, 491_520),
        (hf.GPT2Config(n_embd=1280, n_layer=36, n_head=20), hf.AutoModelForCausalLM, 5, None, 460_800, 460_800),
        (hf.BartConfig(), hf.AutoModelForSeq2SeqLM, 100, 800, 61_823_328, 7_372_800),
        (hf.BartConfig(), hf.AutoModelForSeq2SeqLM, 200, None, 14_745_600, 14_745_600),
    ],
    ids=["GPT2-M P=5", "GPT2-M P=10", "GPT2-L P=5", "BART-L P=100", "BART-L P=200"],
)
def test_counts_of_the_paper(config: Any, auto: Any, length: int, mid: int | None, trained: int, saved: int) -> None:
    model = meta(config, auto)
    method = PrefixTuning(num_virtual_tokens=length, mid_dim=mid)
    method.apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    method.drop_network(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == saved


# The prefix that real tokens leave is those tokens.


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "qwen2", "mistral"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_states_of_words_are_the_words(kind: str, implementation: str, tmp_path: Path) -> None:
    model = model_of(kind)
    model.set_attn_implementation(implementation)
    tokenizer = hf.AutoTokenizer.from_pretrained(save_tokenizer(tmp_path))
    words = torch.tensor([tokenizer(WORDS, add_special_tokens=False)["input_ids"]])
    text = tokens()
    with torch.no_grad():
        expected = model(input_ids=torch.cat((words.expand(2, -1), text), 1)).logits[:, words.shape[1] :]
        PrefixTuning(mid_dim=None, init="text", text=WORDS, tokenizer=str(tmp_path)).apply(model)
        assert_near({"": expected}, {"": model(input_ids=text).logits}, 1e-5)
        # A mask that pads on the right changes nothing before the padding.
        padded = model(
            input_ids=torch.cat((text, torch.zeros(2, 3, dtype=torch.long)), 1),
            attention_mask=torch.tensor([[1] * 6 + [0] * 3] * 2),
        )
        assert_near({"": expected}, {"": padded.logits[:, :6]}, 1e-5)


def test_in_the_decoder_of_t5_too() -> None:
    """With the position bias that tokens before the text have; the source reaches both runs alike."""
    model = tiny("t5")
    source, text, words = tokens(), tokens(seed=1), tokens(1, 4, seed=2)
    with torch.no_grad():
        whole = model(input_ids=source[:1], decoder_input_ids=torch.cat((words, text[:1]), 1)).logits[:, 4:]
        places = [place for place in attention.join(model) if place.kind == "decoder"]
        with attention.recorded(places) as states:
            model(input_ids=source[:1], decoder_input_ids=words)
        attention.leave(model)
        PrefixTuning(num_virtual_tokens=4, mid_dim=None, sets=["decoder"]).apply(model)
        for path, prefix in prefixes(model).items():
            prefix.keys.copy_(states[path][0][0])
            prefix.values.copy_(states[path][1][0])
        assert_near({"": whole}, {"": model(input_ids=source[:1], decoder_input_ids=text[:1]).logits}, 1e-5)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_cross_prefix_is_more_encoder_states(kind: str) -> None:
    model = model_of(kind)
    source, target = tokens(), tokens(seed=1)
    with torch.no_grad():
        encoder = model.get_encoder()(input_ids=source).last_hidden_state
        more = model.get_encoder()(input_ids=tokens(2, 4, seed=3)[:1]).last_hidden_state
        states = hf.modeling_outputs.BaseModelOutput(torch.cat((more.expand(2, -1, -1), encoder), 1))
        expected = model(encoder_outputs=states, decoder_input_ids=target).logits
        places = [place for place in attention.join(model) if place.kind == "cross"]
        with attention.recorded(places) as seen:
            model(encoder_outputs=hf.modeling_outputs.BaseModelOutput(more), decoder_input_ids=target[:1])
        attention.leave(model)
        PrefixTuning(num_virtual_tokens=4, mid_dim=None, sets=["cross"]).apply(model)
        for path, prefix in prefixes(model).items():
            prefix.keys.copy_(seen[path][0][0])
            prefix.values.copy_(seen[path][1][0])
        found = model(input_ids=source, decoder_input_ids=target).logits
        other_source = model(input_ids=tokens(seed=5), decoder_input_ids=target).logits
    assert_near({"": expected}, {"": found}, 1e-5)
    assert not torch.allclose(found, other_source, atol=0.1), "the source must still matter"


def test_in_an_encoder_they_are_not() -> None:
    """There the words would see the text, too: the identity holds for causal models alone."""
    model, text = tiny("bert"), tokens()
    words = tokens(1, 4, seed=1)
    with torch.no_grad():
        expected = model.bert(input_ids=torch.cat((words.expand(2, -1), text), 1)).last_hidden_state[:, 4:]
        places = attention.join(model)
        with attention.recorded(places) as states:
            model(input_ids=words)
        PrefixTuning(num_virtual_tokens=4, mid_dim=None).apply(model)
        for path, prefix in prefixes(model).items():
            prefix.keys.copy_(states[path][0][0])
            prefix.values.copy_(states[path][1][0])
        assert (expected - model.bert(input_ids=text).last_hidden_state).abs().max() > 0.1


# Positions.


def test_unshifted_positions_start_at_zero() -> None:
    shifted, unshifted = tiny("gpt2"), tiny("gpt2")
    text = tokens()
    for model, positions in ((shifted, "shifted"), (unshifted, "unshifted")):
        torch.manual_seed(0)
        PrefixTuning(num_virtual_tokens=P, mid_dim=None, positions=positions).apply(model)
    with torch.no_grad():
        assert not torch.allclose(shifted(input_ids=text).logits, unshifted(input_ids=text).logits, atol=0.1)
        at = torch.arange(P, P + 6).expand(2, -1)
        assert_near({"": shifted(input_ids=text).logits}, {"": unshifted(input_ids=text, position_ids=at).logits}, 1e-5)


@pytest.mark.parametrize(("kind", "fits"), [("bert", POSITIONS), ("gpt2", POSITIONS), ("roberta", 511), ("opt", 64)])
def test_a_text_that_fits_no_more_is_refused_before_the_model_sees_it(kind: str, fits: int) -> None:
    model = model_of(kind)
    method = PrefixTuning(num_virtual_tokens=P, mid_dim=None)
    method.apply(model)
    longest = tokens(1, fits - P)
    with torch.no_grad():
        model(**method.prepare({"input_ids": longest}))
    with pytest.raises(TuningError, match=f"set max_length to {fits - P}"):
        method.prepare({"input_ids": tokens(1, fits - P + 1)})
    with pytest.raises(IndexError):  # should a user go around `prepare`
        model(input_ids=tokens(1, fits - P + 1))


# Generation.


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "t5", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_and_without_a_cache(kind: str, beams: int) -> None:
    model = model_of(kind)
    plain = model.generate(tokens(), max_new_tokens=6, num_beams=beams, do_sample=False)
    PrefixTuning(num_virtual_tokens=P, mid_dim=None).apply(model)
    shake(model, 1.0)
    how = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False}
    cached, anew = (model.generate(tokens(), use_cache=use, **how) for use in (True, False))
    assert torch.equal(cached, anew)
    assert cached.shape != plain.shape or not torch.equal(cached, plain)


def test_generation_from_a_left_padded_prompt() -> None:
    model = tiny("gpt2")
    PrefixTuning(num_virtual_tokens=P, mid_dim=None).apply(model)
    text = tokens(1, 5)
    padded, mask = torch.cat((torch.zeros(1, 2, dtype=torch.long), text), 1), torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    alone = model.generate(text, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False)[:, 2:], alone)


# Reparametrisation.


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "vit", "bart"])
def test_without_its_network_it_is_live(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    method = PrefixTuning(num_virtual_tokens=P, mid_dim=5)
    method.apply(model)
    shake(model)
    inputs = batch("t5" if kind == "bart" else kind)
    with torch.no_grad():
        live = model(**inputs).logits
        method.drop_network(model)
        assert_near({"": live}, {"": model(**inputs).logits}, 1e-6)
    assert method.mid_dim is None
    assert all(name.endswith((".keys", ".values")) for name in collect(model) if ".prefixtuning." in name)
    save_delta(model, tmp_path / "folded.safetensors")
    fresh = model_of(kind)
    PrefixTuning(num_virtual_tokens=P, mid_dim=None).apply(fresh)
    load_delta(fresh, tmp_path / "folded.safetensors")
    with torch.no_grad():
        assert torch.equal(fresh(**inputs).logits, model(**inputs).logits)
    method.remove(model)
    assert_same(snapshot(model_of(kind), kind) if kind in SETS else {}, snapshot(model, kind) if kind in SETS else {})


def test_dropping_the_network_of_what_is_not_applied_is_refused() -> None:
    with pytest.raises(TuningError, match="PrefixTuning is not applied to this BertFor"):
        PrefixTuning().drop_network(tiny("bert"))


def test_the_network_is_fitted_to_real_words(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    exact, fitted = tiny("gpt2"), tiny("gpt2")
    words = {"init": "text", "text": WORDS, "tokenizer": str(tmp_path)}
    PrefixTuning(mid_dim=None, **words).apply(exact)
    torch.manual_seed(0)
    method = PrefixTuning(mid_dim=64, **words)
    method.apply(fitted)
    assert method.num_virtual_tokens == 4
    start = tiny("gpt2")
    torch.manual_seed(0)
    PrefixTuning(mid_dim=64, num_virtual_tokens=4).apply(start)

    def distance(model: nn.Module) -> float:
        pairs = zip(prefixes(model).values(), prefixes(exact).values(), strict=True)
        return sum((a - b).square().mean().item() for p, q in pairs for a, b in zip(p.rows(), q.rows(), strict=True))

    assert distance(fitted) < 0.7 * distance(start)
    assert all(p.grad is None for p in fitted.parameters())


# What models, sets and layers it reaches.


@pytest.mark.parametrize("kind", ["roberta", "albert", "modernbert", "distilbert", "bert"])
def test_encoders(kind: str) -> None:
    model = model_of(kind)
    hidden = model.base_model(tokens()).last_hidden_state
    PrefixTuning(num_virtual_tokens=P, mid_dim=None).apply(model)
    inputs = {"input_ids": tokens(), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    model(**inputs).logits.sum().backward()
    assert model.base_model(tokens()).last_hidden_state.shape == hidden.shape, "the prefix is in no output"
    for prefix in prefixes(model).values():
        assert prefix.keys.grad is not None
        assert prefix.keys.grad.abs().sum() > 0
    with torch.no_grad():
        changed = dict(inputs, input_ids=inputs["input_ids"].clone())
        changed["input_ids"][1, 4:] = 7
        assert_near({"": model(**inputs).logits}, {"": model(**changed).logits}, 1e-5)


def test_both_towers_of_clip() -> None:
    model = other("clip")
    PrefixTuning(num_virtual_tokens=P, mid_dim=None).apply(model)
    assert {path.split(".")[0] for path in prefixes(model)} == {"text_model", "vision_model"}
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16), "input_ids": tokens()}
    model(**inputs).logits_per_image.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_sets_and_layers() -> None:
    model = tiny("t5")
    PrefixTuning(num_virtual_tokens=P, mid_dim=None, sets=["encoder", "cross"], layers=[-1]).apply(model)
    assert sorted(prefixes(model)) == [
        "decoder.block.1.layer.1.EncDecAttention",
        "encoder.block.1.layer.0.SelfAttention",
    ]


def test_an_attention_of_other_shape_has_a_prefix_of_its_own_shape() -> None:
    model = other("bart")
    PrefixTuning(num_virtual_tokens=P, mid_dim=None).apply(model)
    shapes = {prefix.kind: tuple(prefix.keys.shape) for prefix in prefixes(model).values()}
    assert shapes == {"encoder": (4, P, 8), "decoder": (2, P, 16), "cross": (2, P, 16)}


def test_a_layer_that_is_not_run_is_an_error(tmp_path: Path) -> None:

    class Half(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny("gpt2")

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            first = self.model.transformer.h[0](self.model.transformer.wte(batch["input_ids"]))
            return (first[0] if isinstance(first, tuple) else first).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with (
        pytest.warns(UserWarning, match=r"no gradient in the first step, e\.g\. model\.transformer\.h\.1\.attn"),
        pytest.raises(TuningError, match=r"h\.1\.attn\.prefixtuning\.keys: no loss depends on them"),
    ):
        trainer(tmp_path, PrefixTuning(mid_dim=None)).fit(Half(), loader("gpt2"))


def test_the_attention_is_given_back() -> None:
    model = tiny("t5")
    method = PrefixTuning(num_virtual_tokens=P)
    method.apply(model)
    assert model.config._attn_implementation == "grafted_sdpa"
    assert model.decoder.block[0].layer[0].SelfAttention.config._attn_implementation == "grafted_sdpa"
    method.remove(model)
    configs = {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}
    assert configs == {"sdpa"}


def test_two_methods_share_the_attention() -> None:
    model = tiny("bert")
    prefix, prompt = PrefixTuning(num_virtual_tokens=P), PromptTuning(num_virtual_tokens=2, init="random_uniform")
    before = copy_of(model.state_dict())
    prefix.apply(model)
    LoRA(r=2).apply(model)
    prompt.apply(model)
    both = dict(prompt.prepare(batch("bert")))
    model(**both).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    prefix.remove(model)
    assert model.config._attn_implementation == "sdpa"
    assert_same(before, {name: model.state_dict()[name] for name in before})


# The infix.


def sourced(kind: str, source: int = 4) -> dict[str, Tensor]:
    """Return a batch whose first tokens are a source, which is in no loss."""
    inputs = batch(kind)
    inputs["labels"][:, :source] = -100
    return inputs


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_infix_of_words_is_the_words(kind: str) -> None:
    """With nothing added to its keys and values; the source does not see it."""
    model, plain, words = tiny(kind), tiny(kind), torch.tensor([20, 31, 57])
    method = PrefixTuning(num_virtual_tokens=3, mid_dim=None, form="infix")
    method.apply(model)
    inputs = sourced(kind)
    ids, labels = inputs["input_ids"], inputs["labels"]
    with torch.no_grad():
        for place in grafts(model):
            if hasattr(place.graft, "states"):
                place.graft.states.zero_()
            elif hasattr(place.graft, "weight"):
                place.graft.weight.copy_(plain.get_input_embeddings().weight[words])
        written = torch.cat((ids[:, :4], words.expand(4, -1), ids[:, 4:]), 1)
        targets = torch.cat((labels[:, :4], torch.full((4, 3), -100), labels[:, 4:]), 1)
        expected, found = plain(written, labels=targets), model(**method.prepare(inputs))
        assert_near({"": expected.logits}, {"": found.logits}, 1e-5)
        assert_near({"": expected.loss}, {"": found.loss}, 1e-5)
        shake(model)
        changed = model(**method.prepare(inputs)).logits
        assert_near({"": expected.logits[:, :4]}, {"": changed[:, :4]}, 1e-5)
        assert not torch.allclose(expected.logits[:, 4:], changed[:, 4:], atol=0.1)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_generation_goes_on_from_the_infix(kind: str) -> None:
    model = tiny(kind)
    method = PrefixTuning(num_virtual_tokens=P, mid_dim=None, form="infix")
    method.apply(model)
    ready = method.prepare({"input_ids": tokens(), "attention_mask": torch.ones(2, 6, dtype=torch.long)})
    assert (ready["input_ids"][:, 6:] < 0).all()
    how = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**ready, **how), model.generate(**ready, **how, use_cache=False))


def test_two_batches_in_one_backward_pass_under_checkpointing() -> None:
    """Each layer that is computed anew has the ids of its own batch."""
    model = tiny("gpt2").train()
    method = PrefixTuning(num_virtual_tokens=P, mid_dim=None, form="infix")
    method.apply(model)
    found = []
    for on in (False, True):
        if on:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(2)
        sum(model(**method.prepare(sourced("gpt2", source))).loss for source in (2, 4)).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    assert_near(found[0], found[1], 1e-5)


def test_an_infix_without_ids() -> None:
    model = tiny("gpt2")
    method = PrefixTuning(num_virtual_tokens=P, mid_dim=None, form="infix")
    method.apply(model)
    with pytest.raises(
        TuningError, match="mappings with input_ids, this one is a tuple: let the collate function return"
    ):
        method.prepare((batch("gpt2")["input_ids"], torch.zeros(4)))
    with pytest.raises(TuningError, match="is given embeddings of a text without its prompt"):
        model(inputs_embeds=torch.zeros(1, 3, HIDDEN))


@pytest.mark.parametrize("reads", ["gpt_neo", "bloom"])
def test_an_infix_in_a_model_that_hands_nothing_on(reads: str) -> None:
    """It works, but not under gradient checkpointing."""
    shape = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_heads": 2, "n_head": 2, "n_layer": 2, "num_layers": 2}
    extra = {"attention_types": [[["global"], 2]]} if reads == "gpt_neo" else {}
    model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(reads, **shape, **extra)).train()
    method = PrefixTuning(num_virtual_tokens=P, mid_dim=None, form="infix")
    method.apply(model)
    model(**method.prepare(sourced("gpt2"))).loss.backward()
    model.activation_checkpointing_enable({"use_reentrant": False})
    loss = model(**method.prepare(sourced("gpt2"))).loss
    with pytest.raises(TuningError, match="switch gradient checkpointing off, or take form='prefix'"):
        loss.backward()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("bert", {}, "is no decoder-only model: take form='prefix'"),
        ("t5", {}, "is no decoder-only model"),
        ("gpt2", {"mid_dim": 4}, "give mid_dim=None, and none of sets"),
        ("gpt2", {"form": "suffix"}, "form='suffix' is unknown"),
    ],
)
def test_where_an_infix_cannot_be(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TuningError, match=message):
        PrefixTuning(**{"form": "infix", "mid_dim": None} | changes).apply(tiny(kind))


# What is refused.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0 is no prefix: take 1 or more"),
        ({"mid_dim": 0}, "mid_dim=0 is no width"),
        ({"sets": ["encoder"]}, "names parts of an encoder-decoder, which BertFor"),
        ({"sets": ["coder"]}, "names no attentions: take some of encoder, decoder, cross"),
        ({"positions": "moved"}, "positions='moved' is unknown"),
        ({"layers": [7]}, r"layers has 7, but .* has blocks 0 to 1"),
        ({"num_virtual_tokens": POSITIONS}, "leaves no room in the 64 positions"),
        ({"init": "text"}, "init='text' needs the words of the prefix: give text="),
        ({"init": "text", "text": "good"}, "init='text' needs the words of the model: give tokenizer="),
        ({"dropout": 1.0}, "dropout=1.0 is no probability below 1"),
        ({"init_from": "no/such.safetensors"}, "no/such.safetensors"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    model = tiny("bert")
    before = snapshot(model, "bert")
    with pytest.raises(TuningError, match=message):
        PrefixTuning(**changes).apply(model)
    assert_same(before, snapshot(model, "bert"))
    assert model.config._attn_implementation == "sdpa"


def test_models_without_the_interface_are_named_with_another_way() -> None:
    model = hf.XLNetForSequenceClassification(hf.XLNetConfig(vocab_size=9, d_model=8, n_layer=1, n_head=2, d_inner=8))
    with pytest.raises(TuningError, match=r"XLNet.* outside of transformers' .*PromptTuning or LoRA"):
        PrefixTuning().apply(model)
    with pytest.raises(TuningError, match="Linear is no transformers model"):
        PrefixTuning().apply(nn.Linear(3, 3))


def test_a_prefix_is_not_merged() -> None:
    model = tiny("bert")
    PrefixTuning(num_virtual_tokens=P).apply(model)
    before = output(model, "bert")
    with pytest.raises(TuningError, match="computes what no weight can"):
        merge(model)
    assert torch.equal(output(model, "bert"), before)


def prefixes(model: nn.Module) -> dict[str, Prefix]:
    """Return the prefixes by the path of their attention."""
    return {place.path: place.graft for place in grafts(model) if isinstance(place.graft, Prefix)}


# HF PEFT is right where the cache reaches all that has a prefix: decoder-only models, and BERT.


peft_asks_by_an_old_name = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@peft_asks_by_an_old_name
@pytest.mark.usefixtures("peft_finds_the_cache")
@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "bert", "roberta"])
@pytest.mark.parametrize("projected", [False, True])
def test_it_agrees_with_peft(kind: str, projected: bool) -> None:
    ours, theirs = model_of(kind), model_of(kind)
    task = "SEQ_CLS" if kind in ("bert", "roberta") else "CAUSAL_LM"
    width = 8 if projected else None
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=P, prefix_projection=projected, encoder_hidden_size=width, task_type=task
    )
    theirs = peft.get_peft_model(theirs, config).eval()
    encoder = theirs.prompt_encoder["default"]
    table = encoder(torch.arange(P)[None])[0].detach()  # [P, 2 L H d], keys before values in each layer
    PrefixTuning(num_virtual_tokens=P, mid_dim=None).apply(ours)
    layers = table.view(P, -1, 2, *next(iter(prefixes(ours).values())).keys.shape[::2])
    with torch.no_grad():
        for i, prefix in enumerate(prefixes(ours).values()):
            prefix.keys.copy_(layers[:, i, 0].transpose(0, 1))
            prefix.values.copy_(layers[:, i, 1].transpose(0, 1))
        inputs = {"input_ids": tokens(), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
        assert_near({"": theirs(**inputs).logits[0]}, {"": ours(**inputs).logits[0]}, 1e-5)
        assert_near({"": theirs(**inputs).logits[1, :4]}, {"": ours(**inputs).logits[1, :4]}, 1e-5)


INTENDED_DIFFERENCES = {
    "encoder-decoders": "PEFT gives the decoder's self-attention a prefix, the paper all three attentions",
    "projection": "PEFT runs the network on B copies of its table, we run it once",
    "gradient checkpointing": "PEFT's way through the cache raises an error, ours does not use it",
    "encoders without a cache": "DistilBERT, ALBERT, ModernBERT, ViT, CLIP have no past_key_values, so PEFT has none",
}


@peft_asks_by_an_old_name
def test_where_peft_reaches_the_decoder_alone() -> None:
    """The first of the intended differences, which would show if PEFT changed."""
    config = peft.PrefixTuningConfig(num_virtual_tokens=P, task_type="SEQ_2_SEQ_LM")
    theirs = peft.get_peft_model(tiny("t5"), config)
    theirs(**batch("t5")).loss.backward()
    grads = theirs.prompt_encoder["default"].embedding.weight.grad
    ours = tiny("t5")
    PrefixTuning(num_virtual_tokens=P, mid_dim=None, sets=["decoder"]).apply(ours)
    assert grads.numel() == sum(p.numel() for p in ours.parameters() if p.requires_grad)


def test_a_table_narrower_than_the_model() -> None:
    torch.manual_seed(0)
    model = tiny("gpt2")
    method = PrefixTuning(num_virtual_tokens=P, mid_dim=5, embedding_dim=7)
    method.apply(model)
    sizes = sorted(tuple(value.shape) for name, value in collect(model).items() if ".trunks." in name)
    assert sizes == sorted([(P, 7), (5, 7), (5,)])
    with torch.no_grad():
        trained = model(batch("gpt2")["input_ids"]).logits
        method.drop_network(model)
        assert torch.allclose(model(batch("gpt2")["input_ids"]).logits, trained, atol=1e-6)
    assert (method.mid_dim, method.embedding_dim) == (None, None)


def test_a_table_without_a_network_is_refused() -> None:
    with pytest.raises(
        TuningError, match="embedding_dim=7 is the width of a table that a network reads, and mid_dim=None"
    ):
        PrefixTuning(mid_dim=None, embedding_dim=7).apply(tiny("gpt2"))
