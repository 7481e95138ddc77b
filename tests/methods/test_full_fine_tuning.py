"""FullFineTuning: the baseline is what a Trainer does without any method."""

from pathlib import Path

import pytest
import torch
import transformers as hf

from lightning_peft import FullFineTuning, TuningError, collect, load_delta, save_delta
from tests.contract import MethodContract, assert_same, output, shake
from tests.models import BERT_LARGE, HEADS, KINDS, MINILM, meta, tiny
from tests.modules import Tuned, loader, trainer


class TestFullFineTuning(MethodContract):
    method = FullFineTuning()
    backbones = KINDS
    compiled = ("bert",)

    def count(self, kind: str) -> int:
        """Tables, blocks of 4 (d² + d) + 2 d ff + ff + d and two norms of 2d, as each family varies them."""
        d, ff, v, t, patch = 32, 64, 100, 64, 3 * 4 * 4
        block = 4 * (d * d + d) + 2 * d * ff + ff + d + 2 * 2 * d
        return {
            "bert": (v + t + 2) * d + 2 * d + 2 * block + d * d + d,
            "distilbert": (v + t) * d + 2 * d + 2 * block,
            "gpt2": (v + t) * d + 2 * (block + 2 * d * (4 * d - ff) + 4 * d - ff) + 2 * d,
            "llama": 2 * v * d + 2 * (3 * d * d + 3 * d * ff + 2 * d) + d,
            "t5": v * d + 6 * 4 * d * d + 4 * 2 * d * ff + 2 * 8 * 4 + (2 * 2 + 2 * 3 + 2) * d,
            "vit": patch * d + d + (1 + 17) * d + 2 * block + 2 * d,
        }[kind]


@pytest.mark.parametrize(
    ("config", "total"),
    [
        (hf.BertConfig(), 109_482_240),
        (hf.BertConfig(vocab_size=28996), 108_310_272),
        (BERT_LARGE, 335_141_888),
        (MINILM, 22_713_216),
        (hf.GPT2Config(), 124_439_808),
    ],
    ids=["bert-base-uncased", "bert-base-cased", "bert-large-uncased", "MiniLM", "gpt2"],
)
def test_totals(config: hf.PreTrainedConfig, total: int) -> None:
    model = meta(config)
    FullFineTuning().apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == total


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_it_is_training_without_a_method(kind: str, tmp_path: Path) -> None:
    runs = []
    for callbacks in ([FullFineTuning()], []):
        torch.manual_seed(3)
        module = Tuned(kind, dropout=0.2)
        trainer(tmp_path, *callbacks, max_epochs=2).fit(module, loader(kind, shuffle=True), loader(kind))
        runs.append(dict(module.state_dict()))
    assert_same(*runs)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_its_delta_has_a_tied_weight_once(kind: str, tmp_path: Path) -> None:
    model, method = tiny(kind), FullFineTuning()
    method.apply(model)
    shake(model)
    assert set(collect(model)) == {name for name, _ in model.named_parameters()}
    assert len(collect(model)) < len(model.state_dict())
    fresh = tiny(kind)
    FullFineTuning().apply(fresh)
    load_delta(fresh, save_delta(model, tmp_path / "delta.safetensors"))
    assert torch.equal(output(model, kind), output(fresh, kind))


def test_heads_are_counted_apart() -> None:
    model = tiny("bert")
    assert sum(p.numel() for p in model.parameters()) == TestFullFineTuning().count("bert") + HEADS["bert"]


def test_fp32_copies_of_everything_are_refused() -> None:
    with pytest.raises(TuningError, match=r"keep_fp32=True .* precision='bf16-mixed'"):
        FullFineTuning(keep_fp32=True).apply(tiny("bert"))
