"""What is wrong with the rows of a task is said in one sentence, before the first batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import lightning_peft
from lightning_peft import TuningError
from tests.valley import set_up

Valley = Callable[[str], str]
TAGGED = {"tokens": ["a", "dog"], "tags": ["O", "B-X"]}
ASKED = {"question": "what ?", "context": "a dog .", "answers": {"text": ["dog"], "answer_start": [2]}}
PAIR = {"source": "a dog", "target": "a hen"}
LABELLED = {"text": "the dog", "label": "good"}
FACT = {"sub": "ana", "obj": "dog"}
CLOZE = {"template": "{text} {mask}", "verbalizer": {"good": "good", "bad": "bad"}}
PROBE = {"template": "{sub} {obj}"}
LONG = "dog " * 60

MISTAKES: dict[str, tuple[str, str, dict[str, Any], list[dict[str, Any]], str]] = {
    "tags column": ("TokenClassificationData", "bert", {"tags": "tag"}, [TAGGED], "no column 'tag'; it has e.g. tags"),
    "words column": ("TokenClassificationData", "bert", {"words": "w"}, [TAGGED], "train split has no column 'w'"),
    "unlike many tags": (
        "TokenClassificationData",
        "bert",
        {},
        [TAGGED, {**TAGGED, "tags": ["O"]}],
        "2 words and 1 tags",
    ),
    "no lists": (
        "TokenClassificationData",
        "bert",
        {},
        [{"tokens": "a dog", "tags": ["O"]}],
        "give a list with one entry",
    ),
    "no words": ("TokenClassificationData", "bert", {}, [{"tokens": [], "tags": []}, TAGGED], "rows without words"),
    "answer": (
        "QuestionAnsweringData",
        "bert",
        {},
        [{**ASKED, "answers": {"text": ["cat"], "answer_start": [2]}}],
        "has 'dog' at character 2, not its answer 'cat'",
    ),
    "answers": (
        "QuestionAnsweringData",
        "bert",
        {},
        [{**ASKED, "answers": "dog"}],
        "give a dict of the lists text and answer_start",
    ),
    "starts": (
        "QuestionAnsweringData",
        "bert",
        {},
        [{**ASKED, "answers": {"text": ["dog"], "answer_start": []}}],
        "one start an answer",
    ),
    "context column": (
        "QuestionAnsweringData",
        "bert",
        {"context": "text"},
        [ASKED],
        "no column 'text'; it has e.g. context",
    ),
    "stride": ("QuestionAnsweringData", "bert", {"stride": 200}, [ASKED], "stride=200 does not fit windows of 100"),
    "long question": (
        "QuestionAnsweringData",
        "bert",
        {},
        [{**ASKED, "question": LONG + LONG}],
        "question of 120 tokens leaves 0 of max_length=100",
    ),
    "target column": ("Seq2SeqData", "t5", {"target": "targets"}, [PAIR], "no column 'targets'; it has e.g. target"),
    "empty target": (
        "Seq2SeqData",
        "t5",
        {},
        [PAIR, {**PAIR, "target": " "}],
        "row 2 of the train split has target ' '",
    ),
    "target length": ("Seq2SeqData", "t5", {"max_target_length": 0}, [PAIR], "max_target_length=0 is out of range"),
    "no room": (
        "CausalLMData",
        "gpt2",
        {"prompt": "source", "target": "target"},
        [{**PAIR, "source": LONG + LONG}],
        "leaves no room for its target",
    ),
    "prompt column": (
        "CausalLMData",
        "gpt2",
        {"prompt": "promt"},
        [{"prompt": "a", "text": "b"}],
        "no column 'promt'; it has e.g. prompt",
    ),
    "text column": (
        "LMAdaptationData",
        "t5",
        {"text": "txt"},
        [{"text": "a dog"}],
        "no column 'txt'; it has e.g. text",
    ),
    "little text": ("LMAdaptationData", "t5", {"shortest": 9}, [{"text": "a dog"}], "shorter than 18 tokens together"),
    "shortest": ("LMAdaptationData", "t5", {"shortest": 51}, [{"text": "a dog"}], "take 1 to 50"),
    "slot": (
        "ClozeClassificationData",
        "bert",
        CLOZE | {"template": "{txt} {mask}"},
        [LABELLED],
        "the train split has no column 'txt'; it has e.g. text",
    ),
    "no slot": (
        "ClozeClassificationData",
        "bert",
        CLOZE | {"template": "{text}"},
        [LABELLED, {**LABELLED, "label": "bad"}],
        "has 0 masks: a cloze needs one",
    ),
    "long template": (
        "ClozeClassificationData",
        "bert",
        CLOZE | {"template": LONG + LONG + "{text} {mask}"},
        [LABELLED, {**LABELLED, "label": "bad"}],
        "alone has 120 tokens, beyond the limit of 100",
    ),
    "no word": (
        "ClozeClassificationData",
        "bert",
        CLOZE,
        [LABELLED, {**LABELLED, "label": "fine"}],
        "has no word for 'fine'",
    ),
    "several tokens": (
        "ClozeClassificationData",
        "bert",
        CLOZE | {"verbalizer": {"good": "gooddog", "bad": "bad"}},
        [LABELLED, {**LABELLED, "label": "bad"}],
        "give a word of one token, or multi_token=True",
    ),
    "label column": (
        "ClozeClassificationData",
        "bert",
        CLOZE | {"label": "lable"},
        [LABELLED],
        "no column 'lable'; it has e.g. label",
    ),
    "object": (
        "KnowledgeProbingData",
        "bert",
        PROBE,
        [FACT, {**FACT, "obj": "horsedog"}],
        "candidate 'horsedog' is [2-9] tokens",
    ),
    "no candidate": (
        "KnowledgeProbingData",
        "bert",
        PROBE | {"vocabulary": ["cat", "hen"]},
        [FACT],
        "'dog', which is no candidate of one token",
    ),
    "one candidate": ("KnowledgeProbingData", "bert", PROBE, [FACT], "1 candidates leave no choice"),
    "vocabulary": (
        "KnowledgeProbingData",
        "bert",
        PROBE | {"vocabulary": "none.txt"},
        [FACT],
        "vocabulary='none.txt' is no file",
    ),
    "nothing left": (
        "KnowledgeProbingData",
        "bert",
        PROBE | {"vocabulary": ["cat", "hen"], "unknown": "drop"},
        [FACT],
        "no row of the train split is left",
    ),
    "virtual": (
        "KnowledgeProbingData",
        "bert",
        {"template": "{v:0} {sub} {obj}"},
        [FACT],
        "{v:0} in .* has no virtual tokens: give 1 or more",
    ),
    "made": ("TokenClassificationData", "bert", {"dataset": "made://tag"}, [TAGGED], "made://tag is none of the sets"),
    "long": (
        "TokenClassificationData",
        "bert",
        {"max_length": 9999},
        [TAGGED],
        "max_length=9999 is longer than the 256 tokens",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, valley: Valley, tmp_path: Path) -> None:
    name, kind, arguments, rows, message = MISTAKES[mistake]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    files = {"train": str(tmp_path / "train.parquet"), "validation_share": 0, "test_share": 0, "max_length": 100}
    with pytest.raises(TuningError, match=message.replace("{", r"\{")) as caught:
        set_up(getattr(lightning_peft, name)(**{"tokenizer": valley(kind)} | files | arguments)).train_dataloader()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["TokenClassificationData", "QuestionAnsweringData", "Seq2SeqData", "CausalLMData"])
def test_an_empty_split(name: str, valley: Valley, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(TuningError, match=r"^the train split is empty"):
        set_up(getattr(lightning_peft, name)(tokenizer=valley("bert"), train=str(tmp_path / "empty.jsonl")))


def test_tags_that_the_training_rows_lack(valley: Valley, tmp_path: Path) -> None:
    for split, tag in (("train", "B-PER"), ("validation", "B-PR")):
        Dataset.from_list([{"tokens": ["a"], "tags": [tag]}]).to_json(tmp_path / f"{split}.jsonl")
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation")}
    with pytest.raises(TuningError, match=r"validation split has tag 'B-PR', which train has not; it has e\.g\. B-PER"):
        set_up(lightning_peft.TokenClassificationData(tokenizer=valley("bert"), test_share=0, **files))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": {}}, "leaves nothing to learn"),
        (
            {"tasks": {"a": {"trian": "x.csv"}}},
            r"task 'a' has the argument 'trian', its data have not; it has e\.g\. train",
        ),
        ({"tasks": {"a": {"tokenizer": "x"}}}, "task 'a' has the argument 'tokenizer'"),
        ({"tasks": {"a": {}}, "cap": 0}, "cap=0 leaves no rows"),
        (
            {"tasks": {"a": {"dataset": "made://opinions", "label": "lable"}}},
            "task 'a': the train split has no column 'lable'",
        ),
    ],
)
def test_mistakes_of_several_tasks(arguments: dict[str, Any], message: str, valley: Valley) -> None:
    with pytest.raises(TuningError, match=message):
        set_up(lightning_peft.MultiTaskData(tokenizer=valley("bert"), **arguments))
