"""TrainableTokens: rows of the word table, tied or not, beside other methods."""

import copy
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

from lightning_peft import LoRA, TrainableTokens, TuningError, collect, from_delta, merge, rescale, save_delta
from tests.contract import MethodContract, at_work, shake
from tests.models import HIDDEN, VOCABULARY, save_tokenizer, tiny

TOKENS = [9, 43, 69]


class TestTrainableTokens(MethodContract):
    method = TrainableTokens(tokens=TOKENS)
    backbones = ("bert", "gpt2", "t5")

    def count(self, kind: str) -> int:
        """N d."""
        return len(TOKENS) * HIDDEN


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
def test_it_is_the_model_with_these_rows(kind: str) -> None:
    """Tied (GPT-2, T5) and not, merged and not; the other rows stay."""
    model = tiny(kind)
    TrainableTokens(tokens=[43, 9, 69]).apply(model)
    shake(model)
    rows = next(t for n, t in collect(model).items() if n.endswith("trainabletokens.rows"))
    plain = tiny(kind)
    table = plain.get_input_embeddings().weight
    tied = plain.get_output_embeddings() is not None and plain.get_output_embeddings().weight is table
    assert tied is (kind in ("gpt2", "t5"))
    with torch.no_grad():
        for number, row in zip(TOKENS, rows, strict=True):
            table[number] = row
        head = model.classifier if kind == "bert" else None
        if head is not None:
            plain.classifier.load_state_dict(head.state_dict())
    torch.testing.assert_close(at_work(model, kind), at_work(plain, kind), atol=1e-5, rtol=1e-5)
    folded = merge(copy.deepcopy(model))
    assert torch.equal(folded.get_input_embeddings().weight, table)
    torch.testing.assert_close(at_work(folded, kind), at_work(plain, kind))
    rescale(model, 0.0)
    bare = tiny(kind).get_input_embeddings().weight
    assert torch.equal(merge(model).get_input_embeddings().weight, bare)


def test_new_words_of_a_tokenizer_beside_a_lora(tmp_path: Path) -> None:
    tokenizer = hf.AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "words"))
    tokenizer.add_tokens(["<|user|>", "<|end|>"])
    tokenizer.save_pretrained(tmp_path / "words")
    model, other = tiny("gpt2"), tiny("gpt2")
    for each in (model, other):
        torch.manual_seed(0)
        each.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    method = TrainableTokens(tokens=["<|end|>", "<|user|>"], tokenizer=str(tmp_path / "words"))
    LoRA(r=2).apply(model)
    method.apply(model)
    assert method.tokens == [VOCABULARY, VOCABULARY + 1]
    shake(model)
    ids = torch.tensor([tokenizer("<|user|> good film <|end|>", add_special_tokens=False)["input_ids"]])
    assert {*ids[0].tolist()} > {VOCABULARY, VOCABULARY + 1}
    file = save_delta(model, tmp_path / "delta.safetensors")
    (tmp_path / "words" / "tokenizer.json").unlink()  # which a file does not need
    with torch.no_grad():
        assert torch.equal(from_delta(file, other)(ids).logits, model(ids).logits)


def test_bad_words_are_refused(tmp_path: Path) -> None:
    model, words = tiny("gpt2"), str(save_tokenizer(tmp_path))
    for tokens, why in (
        ([], "tokens=\\[\\] names no word to train"),
        ([VOCABULARY], "token 100 is not in the word table of 100 rows: call model.resize_token_embeddings first"),
        ([9, 9], "names a word twice"),
        (["<|user|>"], "is no token of the tokenizer: add it by tokenizer.add_tokens"),
        ([9, 0.5], "is of another type"),
    ):
        with pytest.raises(TuningError, match=why):
            TrainableTokens(tokens=tokens, tokenizer=words).apply(model)
    TrainableTokens(tokens=["good"], tokenizer=words).apply(model)
    with pytest.raises(TuningError, match="has no table of word embeddings"):
        TrainableTokens(tokens=[1]).apply(tiny("vit"))


def test_a_plain_network_says_which_table_is_of_words() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.lin = nn.Embedding(10, 4), nn.Linear(4, 2)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.lin(self.emb(ids))

    class Saying(Plain):
        def get_input_embeddings(self) -> nn.Module:
            return self.emb

    with pytest.raises(TuningError, match="give it a method get_input_embeddings that returns the table"):
        TrainableTokens(tokens=[1]).apply(Plain())
    model = Saying()
    TrainableTokens(tokens=[1], exclude="lin.*").apply(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["emb.trainabletokens.rows"]
