"""PTuning: virtual tokens through an LSTM, anywhere in a template, and what is left when the LSTM is dropped."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft import PromptTuning, PTuning, TuningError, collect, load_delta, save_delta
from lightning_peft.methods.p_tuning import LSTM, PromptEncoder
from lightning_peft.prompting import Template
from lightning_peft.prompting.encoding import encode
from tests.contract import MethodContract, assert_near, copy_of, output, shake
from tests.models import HIDDEN, MINILM, batch, meta, save_tokenizer, tiny
from tests.modules import Tuned, loader, trainer

P = 4


class TestPTuning(MethodContract):
    method = PTuning(num_virtual_tokens=P)
    backbones = ("bert", "gpt2", "t5")
    identity_at_start = False
    compiled = ("bert",)

    def count(self, kind: str) -> int:
        """14 H² + 18 H + P H, an LSTM of half the width."""
        return 14 * HIDDEN**2 + 18 * HIDDEN + P * HIDDEN


class TestMLP(MethodContract):
    method = PTuning(num_virtual_tokens=P, encoder="mlp")
    backbones = ("distilbert",)
    identity_at_start = False

    def count(self, kind: str) -> int:
        """2 (H² + H) + P H."""
        return 2 * (HIDDEN**2 + HIDDEN) + P * HIDDEN


class TestFolded(MethodContract):
    method = PTuning(num_virtual_tokens=P, encoder="none")
    backbones = ("llama",)
    identity_at_start = False

    def count(self, kind: str) -> int:
        """P H."""
        return P * HIDDEN


@pytest.mark.parametrize(
    ("encoder", "length", "count"),
    [("lstm_half", 9, 8_278_272), ("lstm", 9, 25_395_456), ("none", 9, 9 * 768)],
)
def test_counts_of_the_papers_code(encoder: Any, length: int, count: int) -> None:
    model = meta(hf.BertConfig())
    PTuning(num_virtual_tokens=length, encoder=encoder).apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@pytest.mark.parametrize("length", [1, P])
@pytest.mark.parametrize("encoder", ["lstm_half", "lstm", "mlp"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_without_its_network_it_is_live(kind: str, encoder: Any, length: int, tmp_path: Path) -> None:
    model = tiny(kind)
    method = PTuning(num_virtual_tokens=length, encoder=encoder)
    method.apply(model)
    shake(model)
    assert method.rows(model).shape == (length, HIDDEN)
    live = output(model, kind, method)
    method.drop_network(model)
    assert method.encoder == "none"
    assert not any(isinstance(module, PromptEncoder) for module in model.modules())
    assert_near({"": live}, {"": output(model, kind, method)}, 1e-6)
    grafted = {name: t.shape for name, t in collect(model).items() if ".ptuning." in name}
    assert list(grafted.values()) == [(length, HIDDEN)]
    file = save_delta(model, tmp_path / "folded.safetensors")
    fresh, plain = tiny(kind), PTuning(num_virtual_tokens=length, encoder="none")
    plain.apply(fresh)
    load_delta(fresh, file)
    assert torch.equal(output(fresh, kind, plain), output(model, kind, method))


def test_the_encoder_runs_once_a_step() -> None:
    calls = []
    for kind in ("bert", "gpt2"):
        model, method = tiny(kind), PTuning(num_virtual_tokens=P)
        method.apply(model)
        model.ptuning.lstm.register_forward_hook(lambda module, args, out: calls.append(args[0].shape))
        model(**method.prepare(batch(kind)))
    assert calls == [(P, HIDDEN)] * 2


@pytest.mark.parametrize(("text", "slots"), [("{v:3} {sub} {v:3} {obj} {v:3}", 9), ("{v:3} {sub} {v:3} {mask}", 6)])
def test_the_slots_of_a_template_say_how_many_tokens_there_are(text: str, slots: int) -> None:
    model, method = tiny("bert"), PTuning(template=text)
    method.apply(model)
    assert method.num_virtual_tokens == slots
    assert method.rows(model).shape == (slots, HIDDEN)


def templated(tokenizer: Any, text: str, rows: list[dict[str, str]]) -> dict[str, Tensor]:
    encoded = [encode(Template(text), tokenizer, row, max_length=30) for row in rows]
    longest = max(len(e.input_ids) for e in encoded)
    ids = torch.tensor([e.input_ids + [0] * (longest - len(e.input_ids)) for e in encoded])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def test_virtual_tokens_in_the_middle_of_a_text(tmp_path: Path) -> None:
    """Made of the embeddings of words they are those words, and the words around them stay as they are."""
    tokenizer = hf.AutoTokenizer.from_pretrained(save_tokenizer(tmp_path))
    rows = [{"sub": "green river"}, {"sub": "stone"}]
    soft = templated(tokenizer, "{v:2} {sub} {v:1} {mask}", rows)
    words = tokenizer.convert_tokens_to_ids(["good", "film", "music"])
    hard = dict(soft, input_ids=soft["input_ids"].clone())
    for k, word in enumerate(words):
        hard["input_ids"][soft["input_ids"] == -1 - k] = word
    plain, model = tiny("mlm"), tiny("mlm")
    method = PTuning(template="{v:2} {sub} {v:1} {mask}", encoder="none")
    method.apply(model)
    with torch.no_grad():
        method.rows(model).copy_(plain.get_input_embeddings().weight[words])
        assert method.prepare(soft) is soft
        assert torch.equal(model(**soft).logits, plain(**hard).logits)


def test_the_language_model_is_tuned_at_its_own_rate(tmp_path: Path) -> None:
    method = PTuning(num_virtual_tokens=P, tune_backbone=True, backbone_lr=1e-4)
    module = Tuned("bert", lr=1e-2)
    before = copy_of(module.model.state_dict())
    fit = trainer(tmp_path, method)
    fit.fit(module, loader("bert"), loader("bert"))
    (optimizer,) = fit.optimizers
    names = {id(p): name for name, p in module.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert {rate for name, rate in rates.items() if ".ptuning." in name} == {1e-2}
    assert {rate for name, rate in rates.items() if ".ptuning." not in name} == {1e-4}
    changed = {n for n, t in before.items() if not torch.equal(t, module.model.state_dict()[n])}
    assert "bert.encoder.layer.0.attention.self.query.weight" in changed
    frozen = Tuned("bert")
    trainer(tmp_path, PTuning(num_virtual_tokens=P)).fit(frozen, loader("bert"), loader("bert"))
    assert all(p.grad is None for n, p in frozen.named_parameters() if "ptuning" not in n and "classifier" not in n)


def test_the_lstm_is_that_of_torch() -> None:
    ours, theirs = LSTM(6, 4, 0.0), torch.nn.LSTM(6, 4, num_layers=2, bidirectional=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 6)
    assert_near({"": theirs(x.unsqueeze(1))[0].squeeze(1)}, {"": ours(x)}, 1e-6)


def test_it_starts_from_words(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    model, method = tiny("bert"), PTuning(num_virtual_tokens=3, encoder="none", init="text", text="good film")
    method.tokenizer = str(tokenizer)
    method.apply(model)
    ids = hf.AutoTokenizer.from_pretrained(tokenizer).convert_tokens_to_ids(["good", "film", "good"])
    assert torch.equal(method.rows(model), model.get_input_embeddings().weight[ids])
    assert [words[0][0] for words in method.nearest_words(model, 1)] == ["good", "film", "good"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0 is no prompt"),
        ({"template": "{sub} {mask}"}, r"has no virtual tokens: write a slot such as \{v:3\}"),
        ({"template": "{v:0} {mask}"}, "has no virtual tokens"),
        ({"encoder": "gru"}, "encoder='gru' is no prompt encoder: take one of lstm_half, lstm, mlp, none"),
        ({"dropout": 1.0}, "dropout=1.0 is no probability"),
        ({"init": "words"}, "init='words' is no initial value"),
        ({"init": "text"}, "give text="),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    model = tiny("bert")
    keys = list(model.state_dict())
    with pytest.raises(TuningError, match=message):
        PTuning(**changes).apply(model)
    assert list(model.state_dict()) == keys


def test_an_odd_width_cannot_be_halved() -> None:
    config = hf.BertConfig(
        hidden_size=15, num_attention_heads=3, num_hidden_layers=1, intermediate_size=8, vocab_size=9
    )
    with pytest.raises(TuningError, match="halves the embeddings, which are 15 wide: take 'lstm'"):
        PTuning(num_virtual_tokens=2).apply(hf.BertModel(config))


def test_a_batch_without_the_templates_tokens_is_refused() -> None:
    model, method = tiny("bert"), PTuning(template="{v:2} {text} {mask}")
    method.apply(model)
    with pytest.raises(TuningError, match="puts virtual tokens into the text, and the batch has none"):
        method.prepare(batch("bert"))
    with pytest.raises(TuningError, match="the batch has virtual token 2, PTuning trains 2"):
        method.prepare({"input_ids": torch.tensor([[3, -1, -2, -3]])})


def test_dropping_the_network_of_what_is_not_applied_is_refused() -> None:
    with pytest.raises(TuningError, match="PTuning is not applied"):
        PTuning().drop_network(tiny("bert"))


def test_it_costs_prompt_tuning_and_its_encoder() -> None:
    def trained(method: Any) -> int:
        model: nn.Module = meta(MINILM)
        method.apply(model)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    extra = trained(PTuning(num_virtual_tokens=20)) - trained(PromptTuning(num_virtual_tokens=20))
    assert extra == 14 * 384**2 + 18 * 384


def test_the_network_has_gradients_in_eval_mode_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN goes back through an LSTM that has run in training mode, and through no other."""
    asked, lstm = [], torch.lstm

    def spy(*args: Any) -> Any:
        asked.append(args[5:7])
        return lstm(*args)

    monkeypatch.setattr(torch, "lstm", spy)
    network, x = LSTM(6, 3, dropout=0.5).eval(), torch.randn(4, 6)
    once = network(x)
    with torch.no_grad():
        torch.testing.assert_close(network(x), once)
    assert asked == [(0.0, True), (0.0, False)]
