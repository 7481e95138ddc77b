"""Known data sets, from rows in their own form: what each becomes, and that its configuration reads it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, List, Value, concatenate_datasets

import lightning_peft
from lightning_peft import TuningError
from lightning_peft.data.conversions import converted
from tests.text import write

CONFIGS = Path(__file__).parents[2] / "configs/benchmarks"
ENTITIES = ["O", "B-PERSON", "I-PERSON", "B-GPE"]

ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "e2e": (
        {"meaning_representation": "name[The Vaults], priceRange[more than £30]", "human_reference": "It is dear."},
        {"source": "name : The Vaults | priceRange : more than £30", "target": "It is dear."},
    ),
    "webnlg": (
        {"input": ["Aarhus_Airport | cityServed | Aarhus"], "target": "It serves Aarhus.", "references": []},
        {"source": "Aarhus Airport : cityServed : Aarhus", "target": "It serves Aarhus."},
    ),
    "dart": (
        {
            "tripleset": [["Mars Hill", "JOINED", "1973"], ["Mars Hill", "LOCATION", "North Carolina"]],
            "annotations": {"source": ["x"], "text": ["It joined in 1973."]},
        },
        {"source": "Mars Hill : JOINED : 1973 | Mars Hill : LOCATION : North Carolina", "target": "It joined in 1973."},
    ),
    "boolq": (
        {"question": "is it so", "passage": "It is.", "idx": 0, "label": 1},
        {"source": "boolq passage: It is. question: is it so", "target": "True"},
    ),
    "cb": (
        {"premise": "It rains.", "hypothesis": "it is wet", "idx": 0, "label": 2},
        {"source": "cb hypothesis: it is wet premise: It rains.", "target": "neutral"},
    ),
    "copa": (
        {"premise": "He fell.", "choice1": "It hurt.", "choice2": "He ate.", "question": "effect", "label": 0},
        {"source": "copa choice1: It hurt. choice2: He ate. premise: He fell. question: effect", "target": "choice1"},
    ),
    "multirc": (
        {"paragraph": "<b>Sent 1: </b>A dog.<br>", "question": "Who?", "answer": "A dog", "idx": {"a": 0}, "label": 1},
        {"source": "multirc question: Who? answer: A dog paragraph: Sent 1: A dog. ", "target": "True"},
    ),
    "record": (
        {"passage": "It is so.\n@highlight\nIt was\n@highlight\nhere", "query": "@placeholder is.",
         "entities": ["penguin", "potato"], "answers": ["penguin"]},
        {"source": "record query: @placeholder is. entities: penguin, potato passage: It is so. It was. here",
         "target": "penguin"},
    ),
    "rte": (
        {"premise": "It rains.", "hypothesis": "It is wet.", "idx": 0, "label": 0},
        {"source": "rte hypothesis: It is wet. premise: It rains.", "target": "entailment"},
    ),
    "wic": (
        {"word": "place", "sentence1": "A place.", "sentence2": "Place it.", "start1": 2, "idx": 0, "label": 0},
        {"source": "wic sentence1: A place. sentence2: Place it. word: place", "target": "False"},
    ),
    "wsc": (
        {"text": "Bob asked Tom if he can lend some money.", "span1_text": "Tom", "span2_text": "he",
         "span1_index": 2, "span2_index": 4, "label": 1},
        {"source": "wsc: Bob asked Tom if *he* can lend some money.", "target": "Tom"},
    ),
    "lama": (
        {"sub_label": "Dante", "obj_label": "Florence", "predicate_id": "P19", "masked_sentence": "x"},
        {"sub": "Dante", "obj": "Florence", "predicate_id": "P19"},
    ),
    "multirc_pair": (
        {"paragraph": "<b>Sent 1: </b>A dog.<br>", "question": "Who?", "answer": "A dog", "idx": {"a": 0}, "label": 1},
        {"first": "Sent 1: A dog. ", "second": "Who? A dog", "label": 1},
    ),
    "wic_pair": (
        {"word": "place", "sentence1": "A place.", "sentence2": "Place it.", "start1": 2, "idx": 0, "label": 0},
        {"first": "A place.", "second": "Place it. Does place have the same meaning in both sentences?", "label": 0},
    ),
    "wsc_pair": (
        {"text": "Bob asked Tom if he can lend some money.", "span1_text": "Bob", "span2_text": "he",
         "span1_index": 0, "span2_index": 4, "label": 0},
        {"first": "Bob asked Tom if *he* can lend some money.", "second": "Bob", "label": 0},
    ),
    "srl": (
        {"sentences": [{"words": ["She", "sings"], "named_entities": [0, 0],
                        "srl_frames": [{"verb": "sings", "frames": ["B-ARG0", "B-V"]}]}]},
        {"tokens": ["She", "sings", "|", "sings"], "tags": ["B-ARG0", "B-V", "O", "O"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_row_becomes(name: str) -> None:
    row, expected = ROWS[name]
    assert list(converted(Dataset.from_list([row]), name, "train")) == [expected]


def ontonotes() -> Dataset:
    sentence = {"words": List(Value("string")), "named_entities": List(ClassLabel(names=ENTITIES))}
    rows = [{"sentences": [{"words": ["Ada", "was", "there"], "named_entities": [1, 0, 0]},
                           {"words": ["Rome"], "named_entities": [3]}]}]  # fmt: skip
    return Dataset.from_list(rows, features=Features({"sentences": List(sentence)}))


def test_names_keep_what_they_are_called() -> None:
    made = converted(ontonotes(), "ontonotes", "test")
    assert made["tokens"] == [["Ada", "was", "there"], ["Rome"]]
    assert made.features["tags"].feature.names == ENTITIES
    assert made["tags"] == [[1, 0, 0], [3]]
    numbers = Dataset.from_list([{"sentences": [{"words": ["Ada"], "named_entities": [1]}]}])
    with pytest.raises(TuningError, match="named_entities are numbers without names"):
        converted(numbers, "ontonotes", "test")


def test_a_test_has_all_right_targets_of_a_source() -> None:
    row = ROWS["e2e"][0]
    rows = Dataset.from_list([row, row | {"human_reference": "It costs."}, row])
    assert len(converted(rows, "e2e", "train")) == 3
    (made,) = converted(rows, "e2e", "test")
    assert made["target"] == ["It is dear.", "It costs."]
    several = ROWS["webnlg"][0] | {"references": ["It serves Aarhus.", "Aarhus has it."]}
    assert converted(Dataset.from_list([several]), "webnlg", "train")["target"][:] == several["references"]


@pytest.mark.parametrize("name", ["boolq", "cb", "copa", "multirc", "rte", "wic", "wsc"])
def test_a_secret_label_is_no_target(name: str) -> None:
    rows = Dataset.from_list([ROWS[name][0] | {"label": -1}])
    (made,) = converted(rows, name, "predict")
    assert made["source"] == ROWS[name][1]["source"]
    assert made["target"] is None


def test_what_a_pronoun_does_not_stand_for_is_not_learnt() -> None:
    rows = Dataset.from_list([ROWS["wsc"][0], ROWS["wsc"][0] | {"span1_text": "Bob", "label": 0}])
    assert converted(rows, "wsc", "train")["target"][:] == ["Tom"]


def test_mistakes(model: str, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="convert='e2d' is no data set that is known: take e2e, webnlg"):
        converted(Dataset.from_list([{"text": "a"}]), "e2d", "train")
    with pytest.raises(TuningError, match="no row of the train split is left as convert='wsc' reads it"):
        converted(Dataset.from_list([ROWS["wsc"][0] | {"label": 0}]), "wsc", "train")
    with pytest.raises(TuningError, match="the train split has no column 'passage'"):
        converted(Dataset.from_list([{"text": "a"}]), "boolq", "train")
    secret = write(tmp_path / "secret.jsonl", [ROWS["boolq"][0] | {"label": -1}])
    data = lightning_peft.Seq2SeqData(tokenizer=model, train=secret, test=secret, convert="boolq")
    with pytest.raises(TuningError, match=r"row 1 of the test split, .*, has target None"):
        data.setup("test")


OWN: dict[str, dict[str, Any]] = {
    "glue_cola": {"sentence": "a film", "label": 1},
    "glue_sst2": {"sentence": "a film", "label": 1},
    "glue_mrpc": {"sentence1": "a film", "sentence2": "a river", "label": 1},
    "glue_qqp": {"question1": "a film", "question2": "a river", "label": 1},
    "glue_mnli": {"premise": "a film", "hypothesis": "a river", "label": 1},
    "glue_qnli": {"question": "a film", "sentence": "a river", "label": 1},
    "glue_rte": {"sentence1": "a film", "sentence2": "a river", "label": 1},
    "glue_wnli": {"sentence1": "a film", "sentence2": "a river", "label": 1},
    "glue_stsb": {"sentence1": "a film", "sentence2": "a river", "label": 3.8},
    "xsum": {"document": "a film of the river", "summary": "a film"},
    "cnn_dailymail": {"article": "a film of the river", "highlights": "a film"},
    "squad2": {"id": "1", "question": "what", "context": "a film", "answers": {"text": ["film"], "answer_start": [2]}},
    "lama_trex": ROWS["lama"][0] | {"obj_label": "film"},
    "conll2003": {"tokens": ["a", "film"], "ner_tags": ["O", "B-MISC"]},
    "ontonotes_srl": ROWS["srl"][0],
} | {f"superglue_{name}_head": ROWS[name][0] for name in ("boolq", "cb", "copa", "multirc", "rte", "wic", "wsc")} | {
    name: ROWS[name.removeprefix("superglue_")][0] for name in (
    "e2e", "webnlg", "dart", "superglue_boolq", "superglue_cb", "superglue_copa", "superglue_multirc",
    "superglue_record", "superglue_rte", "superglue_wic", "superglue_wsc",
)}  # fmt: skip


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_configuration_reads_its_rows(path: Path, model: str, tmp_path: Path) -> None:
    given = yaml.safe_load(path.read_text())
    assert hasattr(lightning_peft, given["model"]["class_path"])
    entry = given["data"]
    if entry["class_path"] in ("ContinualData", "DomainData", "ImageClassificationData"):  # see test_image_sets.py
        return
    if path.stem == "ontonotes":
        rows = str(tmp_path / "rows.parquet")
        concatenate_datasets([ontonotes()] * 8).to_parquet(rows)
    else:
        other = {"label": 0} if isinstance(OWN[path.stem].get("label"), int) and path.stem != "superglue_wsc" else {}
        rows = str(tmp_path / "rows.jsonl")
        other |= {"obj_label": "river"} if path.stem == "lama_trex" else {}
        first = {"label": 1} if "label" in other else {}
        Path(rows).write_text("\n".join(json.dumps(OWN[path.stem] | more) for more in (first, other) * 4))
    arguments = {n: v for n, v in entry["init_args"].items() if n not in ("dataset", "config", "validation", "test")}
    if "max_length" in arguments:
        arguments["max_length"] = 32
    arguments |= {"stride": 4} if "stride" in arguments else {}
    data = getattr(lightning_peft, entry["class_path"])(tokenizer=model, train=rows, test=rows, **arguments)
    data.setup("fit")
    assert "input_ids" in next(iter(data.train_dataloader()))
