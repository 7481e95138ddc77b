"""PTuningV2: prefixes with a task head. What is pooled, labelled or pointed at keeps its place."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

from lightning_peft import PTuningV2, TuningError, save_delta
from lightning_peft.core.graft import grafts
from lightning_peft.prompts.prefix import Prefix
from tests.contract import MethodContract, assert_near, shake
from tests.models import BERT_LARGE, HIDDEN, POSITIONS, ROBERTA_LARGE, batch, meta, tiny

P = 3
_CONFIG = {"vocab_size": 100, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}


class TestPTuningV2(MethodContract):
    method = PTuningV2(num_virtual_tokens=P)
    backbones = ("bert", "distilbert", "gpt2")
    on_families = (("p_tuning_v2", PTuningV2(num_virtual_tokens=2)),)
    identity_at_start = False
    compiled = ("bert",)

    def count(self, kind: str) -> int:
        """P 2 L d."""
        return P * 2 * 2 * HIDDEN


class TestWithTheNetwork(MethodContract):
    method = PTuningV2(num_virtual_tokens=P, mid_dim=6)
    backbones = ("bert",)
    identity_at_start = False

    def count(self, kind: str) -> int:
        """P d + (d + 1) mid + (mid + 1) 2 L d."""
        return P * HIDDEN + (HIDDEN + 1) * 6 + 7 * 2 * 2 * HIDDEN


@pytest.mark.parametrize(
    ("config", "length", "mid", "count"),
    [
        (BERT_LARGE, 20, None, 983_040),
        (BERT_LARGE, 20, 512, 25_760_256),
        (ROBERTA_LARGE, 8, None, 393_216),
        (ROBERTA_LARGE, 128, None, 6_291_456),
    ],
    ids=["BERT-L P=20", "BERT-L P=20 projected", "RoBERTa-L P=8", "RoBERTa-L P=128"],
)
def test_counts_of_the_paper(config: hf.PreTrainedConfig, length: int, mid: int | None, count: int) -> None:
    model = meta(config)
    PTuningV2(num_virtual_tokens=length, mid_dim=mid).apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@pytest.mark.parametrize("head", ["TokenClassification", "QuestionAnswering", "MaskedLM", "SequenceClassification"])
def test_every_head_keeps_its_shape(head: str) -> None:
    torch.manual_seed(0)
    model = getattr(hf, f"BertFor{head}")(hf.BertConfig(intermediate_size=64, **_CONFIG)).eval()
    inputs = {name: batch("bert")[name] for name in ("input_ids", "attention_mask")}
    plain = model(**inputs)
    PTuningV2(num_virtual_tokens=P).apply(model)
    tuned = model(**inputs)
    for name, tensor in plain.items():
        assert tuned[name].shape == tensor.shape
        assert not torch.equal(tuned[name], tensor)


def test_the_pooler_is_frozen_and_reads_the_same_place() -> None:
    model = tiny("bert")
    PTuningV2(num_virtual_tokens=P).apply(model)
    inputs = batch("bert")
    model(**inputs).loss.backward()
    assert all(p.grad is None for p in model.bert.pooler.parameters())
    assert all(p.grad is not None for p in model.classifier.parameters())
    hidden = model.bert(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert torch.equal(hidden.pooler_output, model.bert.pooler(hidden.last_hidden_state))


def test_positions_start_after_the_prefix() -> None:
    model, seen = tiny("bert"), []
    PTuningV2(num_virtual_tokens=P).apply(model)
    table = model.bert.embeddings.position_embeddings
    plain = table.weight.clone()
    table.register_forward_hook(lambda module, args, out: seen.append(out))
    model(**batch("bert"))
    assert torch.equal(seen[0][0], plain[P : P + 10])


def test_no_mask_is_a_mask_of_ones() -> None:
    model = tiny("bert")
    PTuningV2(num_virtual_tokens=P).apply(model)
    shake(model)
    ids = batch("bert", padded=False)["input_ids"]
    with torch.no_grad():
        assert_near({"": model(ids).logits}, {"": model(ids, attention_mask=torch.ones_like(ids)).logits}, 1e-5)


def test_the_texts_room_is_what_the_prefix_leaves() -> None:
    model, method = tiny("bert"), PTuningV2(num_virtual_tokens=P)
    method.apply(model)
    with pytest.raises(TuningError, match=f"62 tokens and a prefix of {P} do not fit the {POSITIONS} positions"):
        method.prepare({"input_ids": torch.ones(1, 62, dtype=torch.long)})


def test_it_starts_small_and_takes_the_dropout_of_the_model() -> None:
    model = tiny("bert", dropout=0.25)
    PTuningV2(num_virtual_tokens=50).apply(model)
    found = prefixes(model)
    values = torch.cat([p.flatten() for prefix in found.values() for p in prefix.parameters()])
    assert 0.018 < values.std().item() < 0.022
    assert {prefix.dropout for prefix in found.values()} == {0.25}
    other = tiny("bert", dropout=0.25)
    PTuningV2(num_virtual_tokens=2, dropout=0.5).apply(other)
    assert {prefix.dropout for prefix in prefixes(other).values()} == {0.5}


def test_a_prompt_of_several_tasks_starts_that_of_one(tmp_path: Path) -> None:
    """The heads of the tasks stay behind: the new one has another number of classes."""
    many = tiny("bert")
    PTuningV2(num_virtual_tokens=P).apply(many)
    shake(many)
    file = save_delta(many, tmp_path / "many.safetensors")
    one = hf.BertForSequenceClassification(hf.BertConfig(num_labels=7, intermediate_size=64, **_CONFIG))
    PTuningV2(num_virtual_tokens=P, init_from=str(file)).apply(one)
    for path, prefix in prefixes(one).items():
        assert torch.equal(prefix.keys, prefixes(many)[path].keys)
        assert torch.equal(prefix.values, prefixes(many)[path].values)
    assert one.classifier.out_features == 7
    other = tiny("bert")
    with pytest.raises(TuningError, match=r"init_from=.* has shape \(4, 3, 8\) where .* is \(4, 4, 8\)"):
        PTuningV2(num_virtual_tokens=P + 1, init_from=str(file)).apply(other)
    with pytest.raises(TuningError, match="no such tensor"):
        PTuningV2(num_virtual_tokens=P, mid_dim=4, init_from=str(file)).apply(other)


def prefixes(model: nn.Module) -> dict[str, Prefix]:
    """Return the prefixes by the path of their attention."""
    return {place.path: place.graft for place in grafts(model) if isinstance(place.graft, Prefix)}
