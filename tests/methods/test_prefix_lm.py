"""PrefixLM: the source in both directions, the target from left to right, on decoders and encoders with an LM head."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft import LoRA, PrefixLM, PrefixTuning, PromptTuning, PTuning, TuningError
from lightning_peft.core.graft import grafts
from lightning_peft.tasks.likelihoods import causal_scores, recomputed_scores
from lightning_peft.tasks.shared_text import prefill
from tests.contract import assert_near, copy_of
from tests.models import HIDDEN, batch, tiny
from tests.modules import Tuned, loader, trainer

LENGTH, SOURCE = 10, 6


def prefix_lm(kind: str) -> tuple[nn.Module, PrefixLM]:
    model, method = tiny(kind), PrefixLM()
    method.apply(model)
    return model.eval(), method


def ids(kind: str = "gpt2") -> Tensor:
    return batch(kind, padded=False)["input_ids"]


def source(count: int, size: int = 4) -> Tensor:
    return (torch.arange(LENGTH) < count).long().expand(size, -1)


def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_empty_source_is_a_causal_model(kind: str) -> None:
    model, _ = prefix_lm(kind)
    assert_near(
        {"": logits(tiny(kind).eval(), input_ids=ids())},
        {"": logits(model, input_ids=ids(), source_mask=source(0))},
        1e-5,
    )


def test_an_empty_target_is_an_encoder() -> None:
    """The same weights as an encoder, which sees all, and as a decoder that is made a prefix language model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    encoder = hf.BertForMaskedLM(hf.BertConfig(vocab_size=100, initializer_range=0.3, **sizes)).eval()
    config = hf.BertConfig(vocab_size=100, is_decoder=True, **sizes)
    decoder = hf.BertLMHeadModel(config).eval()
    decoder.load_state_dict(encoder.state_dict())
    inputs = {name: value for name, value in batch("mlm").items() if name != "labels"}
    causal = logits(decoder, **inputs)
    both, real = logits(encoder, **inputs), inputs["attention_mask"].bool()
    PrefixLM().apply(decoder)
    assert_near({"": both[real]}, {"": logits(decoder, **inputs)[real]}, 1e-5)
    PrefixLM().apply(encoder)
    assert_near({"": both[real]}, {"": logits(encoder, **inputs)[real]}, 1e-5)
    assert_near({"": causal[real]}, {"": logits(encoder, **inputs, source_mask=source(0))[real]}, 1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_who_sees_whom(kind: str) -> None:
    model, _ = prefix_lm(kind)
    before = logits(model, input_ids=ids(), source_mask=source(SOURCE))
    for place in range(LENGTH):
        other = ids()
        other[:, place] = (other[:, place] + 7) % 90 + 5
        moved = (logits(model, input_ids=other, source_mask=source(SOURCE)) != before).flatten(2).any(2).all(0)
        expected = torch.ones(LENGTH) > 0 if place < SOURCE else torch.arange(LENGTH) >= place
        assert torch.equal(moved, expected)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_labels_tell_source_from_target(kind: str) -> None:
    model, method = prefix_lm(kind)
    labels = ids().masked_fill(source(SOURCE).bool(), -100)
    inputs = {"input_ids": ids(), "labels": labels}
    prepared = method.prepare(inputs)
    assert torch.equal(prepared["source_mask"], source(SOURCE))
    assert torch.equal(logits(model, **inputs), logits(model, input_ids=ids(), source_mask=source(SOURCE)))
    assert torch.equal(logits(model, **inputs), logits(model, **prepared))
    assert method.prepare({"input_ids": ids(), "labels": torch.zeros(4)}).keys() == {"input_ids", "labels"}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_padding_on_either_side_changes_nothing(kind: str) -> None:
    model, _ = prefix_lm(kind)
    alone = logits(model, input_ids=ids(), source_mask=source(SOURCE))
    pad = torch.zeros(4, 3, dtype=torch.long)
    for order in (lambda row: (row, pad), lambda row: (pad, row)):
        rows = {"input_ids": ids(), "attention_mask": torch.ones_like(ids()), "source_mask": source(SOURCE)}
        found = logits(model, **{name: torch.cat(order(row), 1) for name, row in rows.items()})
        assert torch.isfinite(found).all()
        real = torch.cat(order(torch.ones_like(ids())), 1).bool()
        assert_near({"": alone.flatten(0, 1)}, {"": found[real]}, 1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_generate_says_what_one_pass_over_the_whole_says(kind: str) -> None:
    model, _ = prefix_lm(kind)
    mask = torch.ones_like(ids())
    mask[1, :3] = 0
    written = model.generate(
        ids(), attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    whole = torch.cat([mask, torch.ones(4, 4, dtype=torch.long)], 1)
    is_source = torch.cat([mask, torch.zeros(4, 4, dtype=torch.long)], 1)
    guess = logits(model, input_ids=written, attention_mask=whole, source_mask=is_source).argmax(-1)
    assert torch.equal(written[:, LENGTH:], guess[:, LENGTH - 1 : -1])


def test_scores_of_answers_do_not_depend_on_the_cache() -> None:
    model, _ = prefix_lm("gpt2")
    words = [[[20, 21], [22]]] * 4
    mask = torch.ones_like(ids())
    expected = recomputed_scores(model, ids(), mask, words)
    assert_near({"": expected}, {"": causal_scores(model, ids(), mask, words)}, 1e-5)
    row = torch.cat([ids()[:1], torch.tensor([[20, 21]])], 1)
    found = logits(model, input_ids=row, source_mask=(torch.arange(LENGTH + 2) < LENGTH)[None]).log_softmax(-1)
    assert expected[0, 0].item() == pytest.approx((found[0, LENGTH - 1, 20] + found[0, LENGTH, 21]).item(), abs=1e-4)
    assert prefill(model, [7, 8]) is None, "what begins a source depends on what follows"
    assert not torch.allclose(recomputed_scores(tiny("gpt2").eval(), ids(), mask, words), expected, atol=1e-3)


@pytest.mark.parametrize(
    "other",
    [
        LoRA(r=4),
        PrefixTuning(num_virtual_tokens=3, mid_dim=None),
        PromptTuning(num_virtual_tokens=3, init="random_uniform"),
        PTuning(num_virtual_tokens=3),
    ],
    ids=lambda method: type(method).__name__,
)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_any_method_trains_beside_it(kind: str, other: LoRA, tmp_path: Path) -> None:
    module, method = Tuned(kind), type(other)(**other.init_args())
    trainer(tmp_path, PrefixLM(), method, max_steps=2).fit(module, loader(kind), loader(kind))
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert any(p.requires_grad for p in module.parameters())
    assert {place.graft.owner for place in grafts(module)} == {"prefixlm", type(other).__name__.lower()}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_soft_prompts_are_source(kind: str) -> None:
    """With rows of real words, a prompt is those words before the source."""
    model, mask = tiny(kind), PrefixLM()
    mask.apply(model)
    prompt = PromptTuning(num_virtual_tokens=2, init="random_uniform")
    prompt.apply(model)
    table = model.get_input_embeddings()
    prompt.rows(model).data.copy_(table.weight[[20, 31]])
    inputs = {
        "input_ids": ids(),
        "attention_mask": torch.ones_like(ids()),
        "labels": ids().masked_fill(source(6) > 0, -100),
    }
    plain, _ = prefix_lm(kind)
    words = torch.tensor([[20, 31]]).expand(4, -1)
    expected = logits(
        plain, input_ids=torch.cat([words, ids()], 1), source_mask=torch.cat([torch.ones_like(words), source(6)], 1)
    )
    for prepared in (mask.prepare(prompt.prepare(inputs)), prompt.prepare(mask.prepare(inputs))):
        assert_near({"": expected}, {"": logits(model.eval(), **prepared)}, 1e-5)


def test_remove_gives_the_model_back() -> None:
    model = tiny("gpt2")
    before, weights = logits(model, input_ids=ids()), copy_of(model.state_dict())
    method = PrefixLM()
    method.apply(model)
    assert model.state_dict().keys() == weights.keys()
    method.remove(model)
    assert torch.equal(before, logits(model, input_ids=ids()))


def test_what_is_refused() -> None:
    with pytest.raises(TuningError, match="reads the source in both directions already: leave PrefixLM out"):
        PrefixLM().apply(tiny("t5"))
    with pytest.raises(TuningError, match="is no language model with a mask: load it with its language-model head"):
        PrefixLM().apply(tiny("vit"))
    model = tiny("gpt2")
    PromptTuning(num_virtual_tokens=2, init="random_uniform").apply(model)
    with pytest.raises(TuningError, match="apply PrefixLM before the method of the prompt"):
        PrefixLM().apply(model)
    config = hf.MistralConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, sliding_window=4,
    )  # fmt: skip
    with pytest.raises(TuningError, match=r"see 4 tokens back, .*: take a model with full attention"):
        PrefixLM().apply(hf.MistralForCausalLM(config))
    model, _ = prefix_lm("gpt2")
    with pytest.raises(TuningError, match="has 4 dimensions, and PrefixLM makes the mask of pairs itself"):
        model(input_ids=ids(), attention_mask=torch.ones(4, 1, LENGTH, LENGTH))
