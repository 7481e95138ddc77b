"""A search for a prompt in words: what is asked, what wins, the trace, and the file that the tasks take."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft import TuningError, search_prompts
from lightning_peft.cli import main
from lightning_peft.data import Seq2SeqData, TextClassificationData
from lightning_peft.tasks import PromptedClassification, PromptedGeneration
from lightning_peft.tasks.prompt_search import Found
from lightning_peft.tasks.trigger_search import better_words
from lightning_peft.tasks.written_prompts import solved_rows
from tests.modules import trainer

Valley = Callable[[str], str]
START = "{text} all in all it was {mask} ."
WORDS: dict[str, str | list[str]] = {"bad": "bad", "good": "good"}


def opinions(model: str) -> tuple[PromptedClassification, TextClassificationData]:
    data = TextClassificationData(tokenizer=model, dataset="made://opinions", max_length=64)
    return PromptedClassification(model, START, words=WORDS), data


def run(folder: Path) -> Any:
    return trainer(folder, limit_val_batches=1)


def test_the_best_edit_wins_and_goes_on(valley: Valley, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A score that is best with six words: deleting is what helps, and each round starts from the best so far."""
    task, data = opinions(valley("bert"))
    asked: list[list[str]] = []

    def validate(model: Any, rows: Any, verbose: bool) -> list[dict[str, float]]:
        texts = [template.text for template in model.templates]
        asked.append(texts)
        scores = [-float(abs(len(text.split()) - 6)) for text in texts]
        return [{"val_accuracy": scores[0]} | {f"val_accuracy/{i}": s for i, s in enumerate(scores, 1)}]

    judge = run(tmp_path)
    monkeypatch.setattr(judge, "validate", validate)
    found = search_prompts(task, data, "edits", 21, width=5, trainer=judge)
    assert len(found.tried) == 21 == sum(map(len, asked))
    assert len({one.template for one in found.tried}) == 21
    assert found.tried[0].template == START
    assert found.best.score > found.tried[0].score
    assert task.templates[0].text == found.best.template
    for number, one in enumerate(found.tried[1:], 1):
        before = found.tried[: 1 + 5 * ((number - 1) // 5)]
        assert one.parent == max(before, key=lambda other: other.score).template


def test_candidates_of_files_are_compared_on_validation_rows(valley: Valley, tmp_path: Path) -> None:
    task, data = opinions(valley("bert"))
    (tmp_path / "own.txt").write_text("{text} {mask} .\n{text} it was {mask} .\n")
    found = search_prompts(task, data, "file", 9, file=str(tmp_path / "own.txt"), trainer=run(tmp_path))
    assert [one.how for one in found.tried] == ["given", "file", "file"]
    for one in found.tried:
        alone = PromptedClassification(valley("bert"), one.template, words=WORDS)
        assert one.score == pytest.approx(run(tmp_path).validate(alone, data, verbose=False)[0]["val_accuracy"])
    (tmp_path / "words.txt").write_text("was: is\n")
    found = search_prompts(task, data, "paraphrase", 9, file=str(tmp_path / "words.txt"), trainer=run(tmp_path))
    assert all(one.template.count("is") or one.how == "given" for one in found.tried)


def test_mined_candidates(valley: Valley, tmp_path: Path) -> None:
    task, data = opinions(valley("bert"))
    text, label = next((row["text"], said) for row, said in solved_rows(task, data) if said not in row["text"])
    (tmp_path / "text.txt").write_text(f"she said {text} , which is {label} .\n")
    found = search_prompts(task, data, "mine", 5, file=str(tmp_path / "text.txt"), trainer=run(tmp_path))
    assert [one.template for one in found.tried[1:]] == ["she said {text} , which is {mask} ."]
    (tmp_path / "text.txt").write_text("nothing of it\n")
    with pytest.raises(TuningError, match="how='mine' gives no candidates: give a file with more"):
        search_prompts(task, data, "mine", 5, file=str(tmp_path / "text.txt"), trainer=run(tmp_path))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_gradient_points_to_words_that_lower_the_loss(kind: str, valley: Valley) -> None:
    """To first order: the words it ranks first change the loss as their rows say."""
    model = valley(kind)
    start = START if kind == "bert" else "{text} all in all it was {answer}"
    data = TextClassificationData(tokenizer=model, dataset="made://opinions", max_length=64)
    task = PromptedClassification(model, start, words=WORDS)
    found = better_words(task, data, start, 0, 6, seed=0)
    assert len(set(found)) == 6
    for text in found:
        assert text.split()[1:][1:] == start.split()[1:][1:]
        assert text.split()[0] == "{text}"
    assert found == better_words(task, data, start, 0, 6, seed=0)
    assert not list(task.backbone.get_input_embeddings().children())
    assert all(p.grad is None for p in task.backbone.parameters())
    searched = search_prompts(task, data, "gradient", 5, width=2, trainer=run(Path()))
    assert [one.how for one in searched.tried] == ["given", *["gradient"] * 4]


def test_instructions_that_the_model_writes(valley: Valley, tmp_path: Path) -> None:
    model = valley("gpt2")
    task = PromptedGeneration(model, "{source} = {answer}", target="target", max_new_tokens=4)
    data = Seq2SeqData(tokenizer=model, dataset="made://descriptions", max_length=64, batch_size=4)
    found = search_prompts(task, data, "write", 3, trainer=run(tmp_path))
    assert 2 <= len(found.tried) <= 3
    assert all(one.template.endswith("\n{source} = {answer}") for one in found.tried[1:])
    assert found.metric == "val_exact_match"


def test_the_result_is_a_file_that_the_task_takes(valley: Valley, tmp_path: Path) -> None:
    task, data = opinions(valley("bert"))
    (tmp_path / "own.txt").write_text("{text} {mask} !\n")
    found = search_prompts(task, data, "file", 2, file=str(tmp_path / "own.txt"), trainer=run(tmp_path))
    path = found.save(tmp_path / "best.yaml", {"bad": "bad", "good": "good"})
    again = PromptedClassification(valley("bert"), str(path))
    assert again.templates[0].text == found.best.template
    assert again.labels == ["bad", "good"]
    trace = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert [row["template"] for row in trace] == [one.template for one in found.tried]
    assert trace[0].keys() == {"metric", "template", "score", "how", "parent"}


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_from_the_command_line(valley: Valley, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["search", "--config", "prompted_classification", "--model.model", valley("bert"), "--how", "edits"]
    words += ["--model.templates", START, "--budget", "4", "--width", "3", "--trainer.limit_val_batches", "1"]
    words += ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--out", "found.yaml"]
    monkeypatch.setattr(sys, "argv", ["lightning-peft", *words])
    main()
    said = capsys.readouterr().out
    assert "4 templates" in said
    assert "written: found.yaml and found.jsonl" in said
    assert len((tmp_path / "found.jsonl").read_text().splitlines()) == 4


def test_mistakes(valley: Valley, tmp_path: Path) -> None:
    task, data = opinions(valley("bert"))
    for arguments, message in (
        ({"how": "luck"}, "how='luck' is no way to find prompts: take file, mine"),
        ({"budget": 1}, "budget=1 and width=5 leave nothing to compare"),
        ({"how": "file"}, "how='file' needs a file of templates, one a line: give file="),
        ({"how": "write"}, "is a masked language model, which writes no texts: take how='edits'"),
    ):
        with pytest.raises(TuningError, match=message):
            search_prompts(task, data, trainer=run(tmp_path), **arguments)
    with pytest.raises(TuningError, match="has no words of its own to replace"):
        better_words(task, data, "{text} {mask}", 0, 3, 0)
    assert Found("x").tried == []
    assert torch.is_grad_enabled()
