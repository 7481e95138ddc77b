"""NearestWords: what a soft prompt is near to, after each epoch."""

import json
from pathlib import Path

import pytest
from torch import Tensor

from lightning_peft import BitFit, PromptTuning, TuningError
from lightning_peft.reports.nearest_words import NearestWords, summary_lines, words_summary
from tests.models import save_tokenizer
from tests.modules import Tuned, loader, trainer


def test_each_epoch_has_a_line_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tokenizer(tmp_path)
    arguments = {"init": "text", "text": "good film", "tokenizer": str(tmp_path)}
    method = PromptTuning(num_virtual_tokens=2, **arguments)
    run = trainer(tmp_path, method, NearestWords(k=3, every_n_epochs=2), max_epochs=4)
    run.fit(Tuned("bert", lr=1e-6), loader("bert"), loader("bert"))
    lines = [json.loads(line) for line in (tmp_path / "nearest_words.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 3]
    assert [[near[0][0] for near in line["words"]] for line in lines] == [["good", "film"]] * 2
    assert [len(near) for near in lines[0]["words"]] == [3, 3]
    printed = capsys.readouterr().out
    assert "PromptTuning, epoch 3" in printed
    assert "good (1.00)" in printed


def test_what_they_have_in_common_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tokenizer(tmp_path)
    method = PromptTuning(num_virtual_tokens=4, init="text", text="good film good music", tokenizer=str(tmp_path))
    run = trainer(tmp_path, method, NearestWords(k=1, labels=["film or music", "nature"]), max_epochs=1)
    run.fit(Tuned("bert", lr=1e-6), loader("bert"), loader("bert"))
    (line,) = [json.loads(line) for line in (tmp_path / "nearest_words.jsonl").read_text().splitlines()]
    assert line["shared"] == {"good": [0, 2]}
    assert line["clusters"] == [[0, 2]]
    assert line["labels"] == {"film or music": [1, 3]}
    printed = " ".join(capsys.readouterr().out.split())
    assert "tokens 0, 2 share neighbours" in printed
    assert "'good' is near to tokens 0, 2" in printed
    assert "class 'film or music' is near to tokens 1, 3" in printed


def test_the_classes_are_those_of_the_task(tmp_path: Path) -> None:
    class Named(Tuned):
        labels = None

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            self.labels = ["good", "film"]
            return super().training_step(batch, batch_idx)

    save_tokenizer(tmp_path)
    method = PromptTuning(num_virtual_tokens=2, init="text", text="good music", tokenizer=str(tmp_path))
    run = trainer(tmp_path, method, NearestWords(k=1), max_epochs=1)
    run.fit(Named("bert", lr=1e-6), loader("bert"), loader("bert"))
    assert json.loads((tmp_path / "nearest_words.jsonl").read_text())["labels"] == {"good": [0]}


def test_clusters_are_joined_through_words() -> None:
    words = [[("Ġa", 1.0)], [("a", 1.0), ("b", 0.9)], [("▁B", 1.0)], [("c", 1.0)], [("d", 1.0)], [("##C", 0.5)]]
    summary = words_summary(words)
    assert summary["clusters"] == [[0, 1, 2], [3, 5]]
    assert summary["shared"] == {"a": [0, 1], "b": [1, 2], "c": [3, 5]}
    assert summary_lines(words_summary([[("a", 1.0)], [("b", 1.0)]], ["c"])) == [
        "no two tokens share a neighbour, and no word of a class is among them"
    ]


def test_without_a_soft_prompt_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="NearestWords finds no soft prompt"):
        trainer(tmp_path, BitFit(), NearestWords()).fit(Tuned("bert"), loader("bert"), loader("bert"))


@pytest.mark.parametrize("name", ["k", "every_n_epochs", "tokens"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(TuningError, match=f"NearestWords's {name}=0 is out of range: take 1 or more"):
        NearestWords(**{name: 0})
