"""Rows that cannot be used are named by the number that the user counts, or left out and counted, in each class."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import lightning_peft
from lightning_peft import TuningError
from tests.modules import trainer
from tests.valley import set_up

Valley = Callable[[str], str]
Row = dict[str, Any]
SAID = {"messages": [{"role": "user", "content": "a dog"}, {"role": "assistant", "content": "a hen"}]}
ASKED = {"prompt": "a dog", "text": "a hen"}
PAIR = {"source": "a dog", "target": "a hen"}
COMPARED = {"prompt": "a dog", "chosen": "a hen", "rejected": "a cat"}
ALIKE = {"anchor": "a dog", "positive": "a hen"}
LABELLED = [{"text": "a dog", "label": "good"}, {"text": "a hen", "label": "bad"}]
FACTS = [{"sub": "ana", "obj": "dog"}, {"sub": "ben", "obj": "hen"}]
CLOZE = {"template": "{text} {mask}", "verbalizer": {"good": "good", "bad": "bad"}}
TURNED = "has in {!r} and {!r} what row 1 of the train split has the other way round: leave out the one that is wrong."
RENAMED = "has 'other' and no {!r}, unlike the first row: give all rows the same names."
LONG = "dog " * 120

CASES: dict[str, tuple[str, dict[str, Any], list[Row], list[tuple[Row, str]]]] = {
    "ChatData": ("gpt2", {"template": "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"}, [SAID], [
        ({"messages": None}, "has 'None' for messages: give a list of role and content."),
        ({"messages": None, "other": "a"}, RENAMED.format("messages")),
    ]),
    "CausalLMData": ("gpt2", {"prompt": "prompt"}, [ASKED, {**ASKED, "prompt": "a cat"}], [
        ({**ASKED, "prompt": None}, "has None for its prompt, in column 'prompt': give a text."),
        ({**ASKED, "prompt": " "}, "has ' ' for its prompt, in column 'prompt': give a text."),
        ({**ASKED, "text": ""}, "has target '' in column 'text': give a text, or a list."),
        ({**ASKED, "prompt": LONG}, "cannot be used: a prompt of 121 tokens leaves no room for its target: raise "
         "max_length."),
        ({"prompt": "a hen", "text": "a dog "}, TURNED.format("prompt", "text")),
        ({"prompt": "a", "text": None, "other": "b"}, RENAMED.format("text")),
    ]),
    "Seq2SeqData": ("t5", {}, [PAIR, {"source": "a hen", "target": "a dog"}], [
        ({**PAIR, "source": None}, "has None for its prompt, in column 'source': give a text."),
        ({**PAIR, "target": None}, "has target None in column 'target': give a text, or a list."),
        ({"source": None, "target": "a", "other": "b"}, RENAMED.format("source")),
    ]),
    "PreferenceData": ("gpt2", {}, [COMPARED, {**COMPARED, "prompt": "a cat"}], [
        ({**COMPARED, "chosen": "a cat"}, "has the same tokens for chosen and rejected: leave the row out, or raise "
         "max_length."),
        ({**COMPARED, "prompt": LONG}, "cannot be used: a prompt of 121 tokens leaves no room for its target: raise "
         "max_length."),
        ({**COMPARED, "chosen": "a cat", "rejected": "a hen"}, TURNED.format("chosen", "rejected")),
        ({**COMPARED, "rejected": None, "other": "a"}, RENAMED.format("rejected")),
    ]),
    "SentencePairsData": ("bert", {}, [ALIKE, {**ALIKE, "anchor": "a cat"}], [
        ({"anchor": "a dog", "positive": "a dog"}, "has the same text in columns 'anchor' and 'positive': leave the "
         "row out."),
        ({"anchor": "a hen", "positive": "a dog"}, TURNED.format("anchor", "positive")),
        ({"anchor": "a hen", "positive": None, "other": "a"}, RENAMED.format("positive")),
    ]),
    "ClozeClassificationData": ("bert", CLOZE, LABELLED, [
        ({"text": "", "label": "bad"}, "has nothing in 'text': give a text, or leave the row out."),
        ({"text": "a", "label": None}, "has no label in column 'label': give one, or leave the row out."),
        ({"text": "a", "label": None, "other": "bad"}, RENAMED.format("label")),
    ]),
    "KnowledgeProbingData": ("bert", {"template": "{sub} {obj}", "vocabulary": ["dog", "hen"]}, FACTS, [
        ({"sub": " ", "obj": "dog"}, "has nothing in 'sub': give a text, or leave the row out."),
        ({"sub": "ana", "obj": None}, "has no label in column 'obj': give one, or leave the row out."),
        ({"sub": "ana", "obj": "cat"}, "has object 'cat', which is no candidate of one token: add it to the "
         "vocabulary, or set unknown=drop."),
    ]),
}  # fmt: skip
"""Class -> the model of its tokenizer, arguments, good rows, and bad rows with what is said of each."""


def read(name: str, kind: str, folder: Path, rows: list[Row], valley: Valley, **arguments: Any) -> Any:
    """Return data of the rows as the lines of a file, once they are read."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"train": str(file), "validation_share": 0, "test_share": 0, "max_length": 100}
    return set_up(getattr(lightning_peft, name)(tokenizer=valley(kind), **options | arguments))


@pytest.mark.parametrize("name", CASES)
def test_bad_rows_are_named_and_left_out(name: str, valley: Valley, tmp_path: Path) -> None:
    kind, arguments, good, bad = CASES[name]
    for row, message in bad:
        with pytest.raises(TuningError) as caught:
            read(name, kind, tmp_path, [*good, row], valley, **arguments)
        assert str(caught.value) == f"row {len(good) + 1} of the train split {message}"
    rows = [*good, *(row for row, _ in bad), *good]
    count = f"^{len(bad)} of {len(rows)} rows of the train split are left out, the first: row {len(good) + 1} of the "
    with pytest.warns(UserWarning, match=count):
        data = read(name, kind, tmp_path, rows, valley, skip_bad_rows=True, **arguments)
    assert len(data._encoded["train"]) == 2 * len(good)


def test_rows_that_are_drawn_have_the_numbers_of_the_file(valley: Valley, tmp_path: Path) -> None:
    rows = [{**PAIR, "source": f"dog {number}"} for number in range(20)]
    drawn_rows = read("Seq2SeqData", "t5", tmp_path, rows, valley, validation_share=0.5)
    for split, drawn in (("train", ""), ("validation", " drawn for validation,")):
        place = rows.index(drawn_rows.rows(split)[3])
        odd = [*rows[:place], {**PAIR, "source": ""}, *rows[place + 1 :]]
        comma = "," if drawn else ""
        for whole in (False, True):
            message = f"^row {place + 1} of the train split{comma}{drawn} has '' for its prompt"
            with pytest.raises(TuningError, match=message):
                read("Seq2SeqData", "t5", tmp_path, odd, valley, validation_share=0.5, whole=whole)


def test_instructions_name_the_row_of_their_task(valley: Valley, tmp_path: Path) -> None:
    (tmp_path / "asked.yaml").write_text("task: kept\ntemplates: {plain: '{text} {answer}'}\n")
    Dataset.from_list([LABELLED[0], {"text": "a hen", "label": " "}]).to_json(tmp_path / "own.jsonl")
    source = {"train": str(tmp_path / "own.jsonl"), "validation_share": 0, "test_share": 0}
    task = {"instructions": str(tmp_path / "asked.yaml"), "source": source}
    data = lightning_peft.InstructionSeq2SeqData(valley("t5"), {"kept": task}, templates=None)
    with pytest.raises(TuningError, match=r"^task 'kept': row 2 of the train split has target ' ' in column 'target'"):
        set_up(data)


def test_prompted_rows_are_looked_at_before_the_first_prompt(valley: Valley, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [*LABELLED, {"text": " ", "label": "good"}, {"text": "a cat", "label": None}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = lightning_peft.PromptedClassification(valley("bert"), "{text} {mask}", words={"bad": "bad", "good": "good"})
    asks = {"tokenizer": valley("bert"), "train": str(file), "test": str(file), "validation_share": 0}
    run = trainer(tmp_path)
    with pytest.raises(TuningError, match="has rows without a label in column 'label', the first of them row 4: leave"):
        run.test(task, lightning_peft.TextClassificationData(**asks), verbose=False)
    data = lightning_peft.TextClassificationData(**asks, skip_bad_rows=True)
    with pytest.warns(UserWarning, match="2 of 4 rows of the test split are left out, the first: row 3 of the test"):
        run.test(task, data, verbose=False)
    task = lightning_peft.PromptedGeneration(valley("gpt2"), "{source} {answer}", target="target", max_new_tokens=1)
    file.write_text(json.dumps(PAIR) + "\n" + json.dumps({**PAIR, "target": None}) + "\n")
    with pytest.raises(TuningError, match="row 2 of the test split has nothing in 'target': give a text"):
        run.test(task, lightning_peft.Seq2SeqData(**asks), verbose=False)
