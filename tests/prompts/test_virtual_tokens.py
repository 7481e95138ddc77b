"""Virtual tokens: id -1 - k is row k; the batch grows by P columns, and whatever runs along it grows alike."""

import pytest
import torch
import transformers as hf
from torch import nn

from lightning_peft import TuningError, attach
from lightning_peft.prompts.virtual_tokens import (
    VirtualTokens,
    frequent_ids,
    insert,
    is_widened,
    uniform_rows,
    word_rows,
)
from tests.models import batch, tiny

IDS = torch.tensor([[3, 11, 12, 13], [3, 14, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def test_ids_after_the_first_token() -> None:
    widened = insert({"input_ids": IDS, "attention_mask": MASK}, 2, after=1)
    assert widened["input_ids"].tolist() == [[3, -1, -2, 11, 12, 13], [3, -1, -2, 14, 0, 0]]
    assert widened["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]


def test_ids_before_the_first_token() -> None:
    widened = insert({"input_ids": IDS, "attention_mask": MASK}, 3, after=0)
    assert widened["input_ids"].tolist() == [[-1, -2, -3, 3, 11, 12, 13], [-1, -2, -3, 3, 14, 0, 0]]


@pytest.mark.parametrize(("after", "row"), [(0, [0, 0, -1, -2, 3, 14]), (1, [0, 0, 3, -1, -2, 14])])
def test_padding_on_the_left_stays_left(after: int, row: list[int]) -> None:
    inputs = {"input_ids": IDS.flip(0), "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])}
    inputs["input_ids"][0] = torch.tensor([0, 0, 3, 14])
    widened = insert(inputs, 2, after)
    assert widened["input_ids"][0].tolist() == row
    assert widened["attention_mask"][0].tolist() == [0, 0, 1, 1, 1, 1]


def test_a_batch_without_a_mask_gets_one() -> None:
    widened = insert({"input_ids": IDS}, 2, after=0)
    assert widened["attention_mask"].tolist() == [[1] * 6] * 2


def test_what_runs_along_the_ids_is_widened_and_the_rest_is_not() -> None:
    inputs = {
        "input_ids": IDS,
        "attention_mask": MASK,
        "token_type_ids": torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0]]),
        "labels": torch.tensor([[-100, 1, 2, 0], [-100, 2, -100, -100]]),
        "special_tokens_mask": torch.tensor([[1, 0, 0, 0], [1, 0, 1, 1]]),
        "position_ids": torch.arange(4).expand(2, -1),
        "start_positions": torch.tensor([2, 0]),
        "end_positions": torch.tensor([3, 0]),
        "weight": torch.ones(2),
        "pixel_values": torch.ones(2, 4),
        "text": ["a", "b"],
    }
    widened = insert(inputs, 2, after=1)
    assert widened["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 0, 0]]
    assert widened["labels"].tolist() == [[-100, -100, -100, 1, 2, 0], [-100, -100, -100, 2, -100, -100]]
    assert widened["special_tokens_mask"].tolist() == [[1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 1, 1]]
    assert widened["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 5]
    assert widened["start_positions"].tolist() == [4, 0]
    assert widened["end_positions"].tolist() == [5, 0]
    for name in ("weight", "pixel_values", "text"):
        assert widened[name] is inputs[name]
    assert inputs["input_ids"] is IDS, "the batch itself must not change"


def test_labels_of_rows_stay() -> None:
    labels = torch.tensor([1, 2])
    assert insert({"input_ids": IDS, "labels": labels}, 2, after=1)["labels"] is labels


def test_as_many_rows_as_tokens_are_no_token_labels() -> None:
    labels = torch.arange(4)
    assert insert({"input_ids": torch.ones(4, 4).long(), "labels": labels}, 2, after=1)["labels"] is labels


def test_targets_of_a_decoder_stay() -> None:
    labels = IDS + 1
    assert insert({"input_ids": IDS, "labels": labels}, 2, after=0, targets=True)["labels"] is labels


def test_is_widened() -> None:
    assert not is_widened({"input_ids": IDS})
    assert is_widened(insert({"input_ids": IDS}, 1, after=0))


@pytest.mark.parametrize("wrong", [[IDS], IDS, {"pixel_values": IDS}, {"input_ids": IDS.tolist()}, None])
def test_what_is_no_mapping_with_ids_is_refused(wrong: object) -> None:
    for check in (is_widened, lambda value: insert(value, 1, 0)):
        with pytest.raises(TuningError, match=rf"this one is a {type(wrong).__name__}.*what the tokenizer gives"):
            check(wrong)


def test_the_table_gives_virtual_ids_their_rows() -> None:
    table = nn.Embedding(9, 4)
    weight = nn.Parameter(torch.randn(3, 4))
    attach(table, VirtualTokens(weight), "prompt")
    out = table(torch.tensor([[5, -1, -3], [-2, 0, 8]]))
    assert torch.equal(out[0], torch.stack([table.weight[5], weight[0], weight[2]]))
    assert torch.equal(out[1], torch.stack([weight[1], table.weight[0], table.weight[8]]))
    out.sum().backward()
    assert weight.grad.tolist() == [[1.0] * 4] * 3
    assert not table.weight.grad[[1, 2, 3, 4, 6, 7]].any()


def test_a_padding_row_gets_no_gradient_from_virtual_ids() -> None:
    table = nn.Embedding(9, 4)
    attach(table, VirtualTokens(nn.Parameter(torch.randn(3, 4))), "prompt")
    table(torch.tensor([[-1, -2]])).sum().backward()
    assert not table.weight.grad.any()


def test_rows_are_cast_to_the_dtype_of_the_table() -> None:
    table = nn.Embedding(9, 4).bfloat16()
    attach(table, VirtualTokens(nn.Parameter(torch.randn(3, 4))), "prompt")
    assert table(torch.tensor([[-1, 2]])).dtype == torch.bfloat16


def test_the_graft_keeps_no_tensor_between_calls() -> None:
    table = nn.Embedding(9, 4)
    graft = attach(table, VirtualTokens(nn.Parameter(torch.randn(3, 4))), "prompt")
    before = dict(vars(graft))
    table(torch.tensor([[-1, 2]]))
    assert {name: value for name, value in vars(graft).items() if isinstance(value, torch.Tensor)} == {}
    assert vars(graft) == before


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_prompts_of_several_tasks_in_one_batch(kind: str) -> None:
    """Row i has the prompt of its own task: equal to a run of that task alone."""
    model = tiny(kind)
    table = model.get_input_embeddings()
    attach(table, VirtualTokens(nn.Parameter(torch.randn(6, 32))), "prompt")
    first = insert({n: v for n, v in batch(kind, padded=False).items() if n != "labels"}, 3, after=1)
    second = first | {"input_ids": torch.where(first["input_ids"] < 0, first["input_ids"] - 3, first["input_ids"])}
    mixed = first | {"input_ids": torch.cat([first["input_ids"][:2], second["input_ids"][2:]])}
    with torch.no_grad():
        one, other, both = (model(**inputs).logits for inputs in (first, second, mixed))
    assert torch.equal(both[:2], one[:2])
    assert torch.equal(both[2:], other[2:])
    assert not torch.equal(one, other)


def test_tokens_anywhere_in_a_template() -> None:
    model = tiny("gpt2")
    table = model.get_input_embeddings()
    words = [20, 31]
    attach(table, VirtualTokens(nn.Parameter(table.weight[words].detach().clone())), "prompt")
    with torch.no_grad():
        ours = model(torch.tensor([[7, -1, 8, 9, -2, 10]])).logits
        theirs = model(torch.tensor([[7, 20, 8, 9, 31, 10]])).logits
    assert torch.equal(ours, theirs)


def test_random_rows_are_uniform_and_symmetric() -> None:
    rows = uniform_rows(100, 768)
    assert rows.shape == (100, 768)
    assert rows.dtype == torch.float32
    assert rows.abs().max() <= 0.5
    assert rows.min() < -0.49
    assert rows.max() > 0.49
    assert abs(rows.mean().item()) < 0.02
    assert rows.std().item() == pytest.approx(1 / 12**0.5, rel=0.01)


def test_word_rows_are_copies() -> None:
    table = nn.Embedding(9, 4)
    rows = word_rows(table, [3, 5, 3])
    assert torch.equal(rows, table.weight[[3, 5, 3]])
    rows.zero_()
    assert table.weight[3].any()


def test_frequent_words_are_words(tokenizer) -> None:
    words = hf.AutoTokenizer.from_pretrained(tokenizer)
    ids = frequent_ids(words, 100, most=3)
    assert words.convert_ids_to_tokens(ids) == ["the", "of", "and"]
    every = frequent_ids(words, 100, most=5000)
    assert every == list(range(12, 100)), "all but specials, unused tokens and single letters"
    assert not set(every) & set(words.all_special_ids)
    assert frequent_ids(words, 14, most=5000) == [12, 13], "the table may be shorter than the vocabulary"
