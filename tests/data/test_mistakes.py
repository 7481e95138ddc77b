"""What is wrong with a source of texts is said in one sentence, before the first batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from lightning_peft import ColouredShapes, MultiTaskData, TextClassification, TuningError
from lightning_peft.data import TextClassificationData
from lightning_peft.data.module import DataModule
from tests.text import ENDINGS, sentences, write

GOOD = sentences(12)
MISTAKES: dict[str, tuple[dict[str, Any], list[dict[str, Any]], str]] = {
    "text column": ({"text": "txt"}, GOOD, r"^the train split has no column 'txt'; it has e\.g\. text"),
    "label column": ({"label": "labels"}, GOOD, r"^the train split has no column 'labels'; it has e\.g\. label"),
    "columns": ({"text": ["a", "b", "c"]}, GOOD, r"names 3 columns: name one, or two"),
    "empty": ({}, [], r"^the test split is empty"),
    "unknown": ({}, [{"text": "a", "label": "peeple"}], r"^the test split has label 'peeple', .*has e\.g\. people"),
    "missing": ({}, [{"text": "a", "label": ""}], r"^the test split has rows without a label in column 'label'"),
    "number": (
        {},
        [{"text": "a", "label": 0.5}],
        r"^column 'label' of the test split holds \w*: give strings or integers",
    ),
    "file": ({"test": "nowhere.csv"}, GOOD, r"^test='nowhere\.csv' is no file: give the path of one\.$"),
    "ending": ({"test": "rows.txt"}, GOOD, r"^test='rows\.txt' ends in none of \.csv, \.tsv, "),
    "dataset": (
        {"dataset": "no/such"},
        GOOD,
        r"^dataset='no/such' cannot be loaded \(.*\): give a hub id or a folder\.$",
    ),
    "tokenizer": ({"tokenizer": "no/such"}, GOOD, r"^no tokenizer at 'no/such' \(.*\): give its folder or hub id\.$"),
    "max_length": ({"max_length": 0}, GOOD, r"^max_length=0 is out of range: take 1 or more\.$"),
    "shares": ({"test_share": 0.6, "validation_share": 0.4}, GOOD, r"leave nothing to train on"),
}


def set_up(arguments: dict[str, Any]) -> None:
    data = TextClassificationData(**arguments)
    for stage in ("fit", "test"):
        data.setup(stage)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, model: str, tmp_path: Path) -> None:
    arguments, test_rows, message = MISTAKES[mistake]
    test = tmp_path / "test.jsonl"
    test.touch()
    if test_rows:
        write(test, test_rows)
    arguments = {"tokenizer": model, "train": write(tmp_path / "train.jsonl", GOOD), "test": str(test)} | arguments
    with pytest.raises(TuningError, match=message) as caught:
        set_up(arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("content", ["", '{"text": "a'])
def test_broken_files(content: str, ending: str, model: str, tmp_path: Path) -> None:
    path = tmp_path / f"train{ending}"
    path.write_text(content)
    if content and ending in (".csv", ".tsv"):
        message = "the train split is empty"
    else:
        message = "the train split is empty|is no readable"
    with pytest.raises(TuningError, match=message):
        TextClassificationData(tokenizer=model, train=str(path)).setup("fit")


def test_too_few_classes_or_rows(model: str, tmp_path: Path) -> None:
    path = write(tmp_path / "one.jsonl", [{"text": "a", "label": "x"}] * 3)
    with pytest.raises(
        TuningError, match=r"^column 'label' holds the classes \['x'\]: a classifier needs two or more\.$"
    ):
        _ = TextClassificationData(tokenizer=model, train=path).label_names
    path = write(tmp_path / "two.jsonl", sentences(3))
    with pytest.raises(TuningError, match="the validation split is empty"):
        TextClassificationData(tokenizer=model, train=path).setup("fit")


def test_longer_than_the_tokenizer_allows(model: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(tmp_path / "short")
    data = TextClassificationData(tokenizer=str(tmp_path / "short"), train=write(tmp_path / "t.csv", sentences(30)))
    with pytest.raises(TuningError, match=r"^max_length=128 is longer than the 16 tokens of .*: take 16 or less\.$"):
        data.setup("fit")


def test_test_rows_that_are_not_there(model: str, tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", sentences(20))
    data = TextClassificationData(tokenizer=model, train=path, test_share=0)
    with pytest.raises(TuningError, match=r"has no test rows: give it a test split\.$"):
        data.setup("test")


def test_a_refusal_leaves_loaders_as_torch_has_them(model: str, tmp_path: Path) -> None:
    path, own = write(tmp_path / "train.jsonl", sentences(20)), DataLoader.__init__
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    data = TextClassificationData(tokenizer=model, train=path, test_share=0)
    task = TextClassification(model, ["a", "b"])
    for given in (data, MultiTaskData(tokenizer=model, tasks={"one": {"train": path, "test_share": 0}})):
        with pytest.raises(TuningError, match=r"has no test rows: give it a test split\.$"):
            trainer.test(task, given)
        assert DataLoader.__init__ is own


def test_fewer_rows_than_processes_are_refused_before_a_loader_is_made(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DataModule, "share", {"num_replicas": 64, "rank": 0})
    few = r"rows do not go round 64 processes: use fewer processes\.$"
    path = write(tmp_path / "train.jsonl", sentences(20))
    for data in (TextClassificationData(tokenizer=model, train=path), ColouredShapes(shapes=["star"], per_class=1)):
        with pytest.raises(TuningError, match=few):
            data.setup("fit")


def test_unlabelled_test_of_the_hub(model: str, tmp_path: Path) -> None:
    labelled = Dataset.from_list(sentences(20)).class_encode_column("label")
    blind = labelled.map(lambda row: row | {"label": -1})
    labelled.to_parquet(tmp_path / "hub" / "train.parquet")
    blind.to_parquet(tmp_path / "hub" / "test.parquet")
    data = TextClassificationData(tokenizer=model, dataset=str(tmp_path / "hub"))
    with pytest.raises(TuningError, match="the test split has rows without a label"):
        data.setup("test")


DIRT: dict[str, tuple[str, bytes, str]] = {
    "as it is": ("rows.csv", b"id,text,label\n%s", ""),
    "byte order mark": ("rows.csv", b"\xef\xbb\xbfid,text,label\n%s", ""),
    "capitals": ("rows.CSV", b"id,text,label\n%s", ""),
    "semicolons": ("rows.csv", b"id;text;label\n%s", ""),
    "tabs": ("rows.csv", b"id\ttext\tlabel\n%s", ""),
    "Latin-1": (
        "rows.csv",
        b"id,text,label\n%s1,f\xfcr,a\n",
        r"save it as UTF-8 \(iconv -f latin1 -t utf-8 \S*ws\.csv",
    ),
    "a comma": (
        "rows.csv",
        b"id,text,label\n%s1,one, two,a\n",
        "put quotes around a text that has the separator",
    ),
    "a blank": ("rows.csv", b"id,text ,label\n%s", r"no column 'text'; it has 'text ': name the one that is meant\.$"),
    "no label": ("rows.csv", b"id,text,label\n%s3,c, \n", r"of them row 3: leave them out, or set skip_bad_rows\.$"),
}


@pytest.mark.parametrize("dirt", DIRT)
def test_files_as_people_have_them(dirt: str, model: str, tmp_path: Path) -> None:
    """What can be read is read as it is meant; what cannot says what to do."""
    name, content, message = DIRT[dirt]
    mark = content.partition(b"id")[2][:1]
    lines = b'1,"a, good film\nin two lines",x\n2,"a dull film",y\n'.replace(b",", mark)
    lines = lines.replace(b"a" + mark + b" good", b"a, good")
    (tmp_path / name).write_bytes(content.replace(b"%s", lines))
    data = TextClassificationData(tokenizer=model, train=str(tmp_path / name), test_share=0, validation_share=0)
    if message:
        with pytest.raises(TuningError, match=message):
            data.setup("fit")
        return
    assert data.label_names == ["x", "y"]
    assert data.rows("train")["text"][:] == ["a, good film\nin two lines", "a dull film"]


def test_classes_that_look_like_a_slip(model: str, tmp_path: Path) -> None:
    def data(labels: Sequence[str], **shares: float) -> TextClassificationData:
        rows = [{"text": f"film {i}", "label": label} for i, label in enumerate(labels)]
        return TextClassificationData(tokenizer=model, train=write(tmp_path / "train.jsonl", rows), **shares)

    with pytest.warns(UserWarning, match=r"^the classes \['Good', 'good '\] of column 'label' differ by blanks or cap"):
        _ = data(["Good", "good ", "dull"]).label_names
    with pytest.warns(UserWarning, match=r"^column 'label' has 11 classes in 12 rows, too many to learn from so few"):
        _ = data([*"abcdefghijkk"]).label_names
    rows = data([*"xxxyyyxxz"], validation_share=0.3, test_share=0.3)
    lost = sorted({"x", "y", "z"} - {*rows.rows("train")["label"][:]})
    assert lost
    with pytest.warns(UserWarning, match=f"^no training row has {', '.join(map(repr, lost))} in column 'label', whose"):
        rows.setup("fit")
