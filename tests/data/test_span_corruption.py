"""Span corruption: a text and its gaps give the text back, and gaps are as many and as long as T5's."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lightning_peft import FullFineTuning, LMAdaptation, Seq2SeqData, SpanCorruptionData, TuningError
from lightning_peft.data.span_corruption import counts, parts, sentinels
from tests import models, text
from tests.modules import trainer

SENTINELS = 12


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny T5 whose tokenizer has sentinels."""
    folder = tmp_path_factory.mktemp("t5")
    model = models.tiny("t5")
    models.save_tokenizer(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra_id_{i}>" for i in range(SENTINELS)], special_tokens=True)
    model.resize_token_embeddings(max(len(tokenizer), models.VOCABULARY))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def data(path: str, folder: Path, **kwargs: Any) -> SpanCorruptionData:
    own = {
        split: text.write(folder / f"{split}.jsonl", text.sentences(40, i)) for i, split in enumerate(("train", "test"))
    }
    return SpanCorruptionData(**{"tokenizer": path, "max_length": 24, "batch_size": 8} | own | kwargs)


def filled(source: list[int], target: list[int], gaps: list[int]) -> list[int]:
    """Return a text whose gaps are filled."""
    left_out: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token in gaps:
            left_out[token] = []
        else:
            left_out[list(left_out)[-1]].append(token)
    return [one for token in source[:-1] for one in left_out.get(token, [token])]


def test_the_gaps_filled_are_the_text(path: str, tmp_path: Path) -> None:
    found = data(path, tmp_path, bucket=False)
    found.setup("test")
    rows = found._encoded["test"]
    gaps, end = sentinels(found.tokenizer), found.tokenizer.eos_token_id
    assert len(gaps) == SENTINELS
    texts = found.tokenizer([row["text"] for row in text.sentences(40, 1)], add_special_tokens=False)["input_ids"]
    whole = [token for ids in texts for token in [*ids, end]]
    assert [token for row in rows for token in filled(row["input_ids"], row["labels"], gaps)] == whole
    for row in rows:
        length = len(filled(row["input_ids"], row["labels"], gaps))
        gone, number = counts(length, 0.15, 3.0)
        assert len(row["labels"]) == gone + number + 1
        assert len(row["input_ids"]) == length - gone + number + 1
        assert [token for token in row["input_ids"] if token in gaps] == gaps[:number]
        assert row["input_ids"][-1] == row["labels"][-1] == end
        assert row["input_ids"][0] not in gaps


def test_counts_are_those_of_t5() -> None:
    # random_spans_helper of the authors: 568 tokens become inputs of 512 and targets of 114.
    gone, gaps = counts(568, 0.15, 3.0)
    assert (gone, gaps) == (85, 28)
    assert (568 - gone + gaps + 1, gone + gaps + 1) == (512, 114)
    assert counts(2, 0.15, 3.0) == (1, 1)
    assert counts(2, 0.99, 1.0) == (1, 1)


def test_each_way_to_part_is_as_likely() -> None:
    draw = random.Random(0)
    drawn = [tuple(parts(4, 2, draw)) for _ in range(3000)]
    assert {way: round(drawn.count(way) / 3000, 1) for way in set(drawn)} == {(1, 3): 0.3, (2, 2): 0.3, (3, 1): 0.3}
    assert parts(3, 1, draw) == [3]


def test_the_seed_draws_the_gaps(path: str, tmp_path: Path) -> None:
    def drawn(seed: int) -> list[Any]:
        found = data(path, tmp_path, seed=seed, max_length=60, span=2.0)
        found.setup("test")
        return list(found._encoded["test"])

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_a_model_learns_to_fill_them(path: str, tmp_path: Path) -> None:
    module, found = LMAdaptation(path, lr=1e-2), data(path, tmp_path)
    run = trainer(tmp_path / "run", FullFineTuning(), max_epochs=3)
    before = run.validate(module, found, verbose=False)[0]["val_loss"]
    run.fit(module, found)
    assert run.callback_metrics["val_loss"] < 0.9 * before


def test_targets_begin_with_a_sentinel(path: str, tmp_path: Path) -> None:
    rows = text.write(tmp_path / "pairs.jsonl", [{"source": "good film", "target": "river stone"}] * 4)
    batches = []
    for sentinel in (False, True):
        found = Seq2SeqData(tokenizer=path, train=rows, test=rows, sentinel=sentinel)
        found.setup("test")
        batches.append(next(iter(found.test_dataloader())))
    plain, begun = batches
    assert torch.equal(begun["labels"][:, 1:], plain["labels"])
    assert set(begun["labels"][:, 0].tolist()) == {sentinels(found.tokenizer)[0]}
    assert begun["references"] == plain["references"]


def test_a_piece_of_one_gap_ends_with_it(path: str, tmp_path: Path) -> None:
    found = data(path, tmp_path, max_length=12)
    found.setup("test")
    first = sentinels(found.tokenizer)[0]
    assert {row["input_ids"][-2] for row in found._encoded["test"]} == {first}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.0}, "density=0.0 is no share of tokens"),
        ({"span": 0.5}, "span=0.5 is no mean length of a gap"),
        ({"max_length": 60, "span": 1.0, "density": 0.5}, "60 tokens have 29 gaps, and the tokenizer has 12 sentinels"),
    ],
)
def test_mistakes(path: str, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TuningError, match=message):
        data(path, tmp_path, **arguments).setup("test")


def test_a_tokenizer_without_sentinels(model: str, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="the tokenizer has 0 sentinels"):
        data(model, tmp_path).setup("test")
    rows = text.write(tmp_path / "pairs.jsonl", [{"source": "good film", "target": "river stone"}])
    with pytest.raises(TuningError, match=r"sentinel=True begins targets with <extra_id_0>, which .* does not know"):
        Seq2SeqData(tokenizer=model, train=rows, test=rows, sentinel=True).setup("test")
