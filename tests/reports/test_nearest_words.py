"""NearestWords: what a soft prompt is near to, after each epoch."""

import json
from pathlib import Path

import pytest

from lightning_peft import BitFit, PromptTuning, TuningError
from lightning_peft.reports.nearest_words import NearestWords
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


def test_without_a_soft_prompt_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="NearestWords finds no soft prompt"):
        trainer(tmp_path, BitFit(), NearestWords()).fit(Tuned("bert"), loader("bert"), loader("bert"))


@pytest.mark.parametrize("name", ["k", "every_n_epochs", "tokens"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(TuningError, match=f"NearestWords's {name}=0 is out of range: take 1 or more"):
        NearestWords(**{name: 0})
