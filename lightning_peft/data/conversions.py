"""Rows of known data sets in their own columns, as the columns that a task's data take.

``convert: e2e`` of a data file turns the rows as they come from the hub, or from files of the same columns, into
``source`` and ``target``, ``tokens`` and ``tags``, ``sub`` and ``obj``, or, for a task head, ``first``, ``second`` and
``label``. Rows to train have one target each; others have all right ones of a source in a list. Where a set hides the
labels of its test, a row has no target.

Source of the texts of SuperGLUE: Raffel et al. 2020, arXiv 1910.10683, appendix D, and the authors' preprocessors,
which put the columns of a task in the order of their names; those of WiC lack ``pos``, which the hub does not have.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from datasets import ClassLabel, Dataset, Features, List, Value

from lightning_peft.core.errors import TuningError
from lightning_peft.data.classes import check_columns

Row = Mapping[str, Any]
_TRUE = ("False", "True")
_SEVERAL = ("e2e", "webnlg", "dart", "record")
"""Sets that have several right targets of one source."""
Conversion = Literal[
    "e2e", "webnlg", "dart", "boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc", "lama", "ontonotes",
    "srl", "multirc_pair", "wic_pair", "wsc_pair",
]  # fmt: skip


def converted(rows: Dataset, name: Conversion, split: str) -> Dataset:
    """Return the rows of a known data set in the columns of its task.

    Raises:
        TuningError: the conversion is unknown, or the rows lack a column that it reads, or none has what it asks for.
    """
    if name not in _CONVERSIONS:
        raise TuningError(f"convert={name!r} is no data set that is known: take {', '.join(get_args(Conversion))}.")
    columns, convert = _CONVERSIONS[name]
    check_columns(rows, split, columns)
    names = _tag_names(rows) if name == "ontonotes" else None
    made: list[Row] = [new for row in rows for new in convert(row)]
    if not made:
        raise TuningError(f"no row of the {split} split is left as convert={name!r} reads it: give more rows.")
    if name in _SEVERAL and split != "train":
        made = [*_with_all_targets(made)]
    if names is not None:
        features = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=names))})
        return Dataset.from_list(made, features=features)
    return Dataset.from_list(made)


def triples(rows: Sequence[Sequence[str]]) -> str:
    """Return triples as one text, as in the authors' code of Prefix-Tuning.

    >>> triples([["Abilene", "cityServed", "Airport"], ["Abilene", "country", "United States"]])
    'Abilene : cityServed : Airport | Abilene : country : United States'
    """
    return " | ".join(" : ".join(part.replace("_", " ") for part in row) for row in rows)


def slots(meaning: str) -> str:
    """Return a meaning representation of E2E as one text.

    >>> slots("name[The Vaults], eatType[pub]")
    'name : The Vaults | eatType : pub'
    """
    return " | ".join(f"{name.strip()} : {value}" for name, value in re.findall(r"([^,\[\]]+)\[([^\]]*)\]", meaning))


def _with_all_targets(rows: Sequence[Row]) -> list[dict[str, Any]]:
    found: dict[str, list[str]] = {}
    for row in rows:
        targets = found.setdefault(row["source"], [])
        if row["target"] is not None and row["target"] not in targets:
            targets.append(row["target"])
    return [{"source": source, "target": targets} for source, targets in found.items()]


def _e2e(row: Row) -> Iterator[Row]:
    yield {"source": slots(row["meaning_representation"]), "target": row["human_reference"]}


def _webnlg(row: Row) -> Iterator[Row]:
    source = triples([[part.strip() for part in triple.split("|")] for triple in row["input"]])
    for target in row["references"] or [row["target"]]:
        yield {"source": source, "target": target}


def _dart(row: Row) -> Iterator[Row]:
    for target in row["annotations"]["text"]:
        yield {"source": triples(row["tripleset"]), "target": target}


def _as_text(name: str, columns: Sequence[str], answers: Sequence[str]) -> Callable[[Row], Iterator[Row]]:
    """Return the form of T5: the name of the task, and each column behind its own name."""

    def convert(row: Row) -> Iterator[Row]:
        source = " ".join([name, *(f"{column}: {row[column]}" for column in columns)])
        yield {"source": source, "target": _answer(answers, row["label"])}

    return convert


def _answer(answers: Sequence[str], label: int) -> str | None:
    return answers[label] if 0 <= label < len(answers) else None


def _multirc(row: Row) -> Iterator[Row]:
    text = f"multirc question: {row['question']} answer: {row['answer']} paragraph: {row['paragraph']}"
    yield {"source": _plain(text), "target": _answer(_TRUE, row["label"])}


def _multirc_pair(row: Row) -> Iterator[Row]:
    yield {"first": _plain(row["paragraph"]), "second": f"{row['question']} {row['answer']}", "label": row["label"]}


def _wic_pair(row: Row) -> Iterator[Row]:
    asked = f"{row['sentence2']} Does {row['word']} have the same meaning in both sentences?"
    yield {"first": row["sentence1"], "second": asked, "label": row["label"]}


def _wsc_pair(row: Row) -> Iterator[Row]:
    yield {"first": _starred(row), "second": row["span1_text"], "label": row["label"]}


def _plain(text: str) -> str:
    return re.sub("</?b>", "", text.replace("<br>", " "))


def _starred(row: Row) -> str:
    words, place = row["text"].split(" "), row["span2_index"]
    words[place] = f"*{words[place]}*"
    return " ".join(words)


def _record(row: Row) -> Iterator[Row]:
    passage = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", row["passage"]).replace("\n@highlight\n", ". ")
    text = f"record query: {row['query']} entities: {', '.join(row['entities'])} passage: {passage}"
    for answer in dict.fromkeys(row["answers"] or [None]):
        yield {"source": text, "target": answer}


def _wsc(row: Row) -> Iterator[Row]:
    """Ask what the pronoun stands for, in the rows that say so; T5's test looks at the others, too."""
    if row["label"] == 0:
        return
    yield {"source": f"wsc: {_starred(row)}", "target": row["span1_text"] if row["label"] == 1 else None}


def _lama(row: Row) -> Iterator[Row]:
    yield {"sub": row["sub_label"], "obj": row["obj_label"], "predicate_id": row["predicate_id"]}


def _ontonotes(row: Row) -> Iterator[Row]:
    for sentence in row["sentences"]:
        yield {"tokens": sentence["words"], "tags": sentence["named_entities"]}


def _srl(row: Row) -> Iterator[Row]:
    """A row for each predicate, which stands once more behind the sentence, so that the model knows which is meant."""
    for sentence in row["sentences"]:
        for frame in sentence["srl_frames"]:
            yield {"tokens": [*sentence["words"], "|", frame["verb"]], "tags": [*frame["frames"], "O", "O"]}


def _tag_names(rows: Dataset) -> list[str]:
    feature = rows.features["sentences"].feature["named_entities"].feature
    if not isinstance(feature, ClassLabel):
        raise TuningError(
            "named_entities are numbers without names: give the set as the hub has it, with its class labels."
        )
    names: list[str] = feature.names
    return names


_CONVERSIONS: dict[str, tuple[list[str], Callable[[Row], Iterator[Row]]]] = {
    "e2e": (["meaning_representation", "human_reference"], _e2e),
    "webnlg": (["input", "target", "references"], _webnlg),
    "dart": (["tripleset", "annotations"], _dart),
    "boolq": (["passage", "question", "label"], _as_text("boolq", ["passage", "question"], _TRUE)),
    "cb": (
        ["hypothesis", "premise", "label"],
        _as_text("cb", ["hypothesis", "premise"], ["entailment", "contradiction", "neutral"]),
    ),
    "copa": (
        ["choice1", "choice2", "premise", "question", "label"],
        _as_text("copa", ["choice1", "choice2", "premise", "question"], ["choice1", "choice2"]),
    ),
    "multirc": (["question", "answer", "paragraph", "label"], _multirc),
    "record": (["query", "entities", "passage", "answers"], _record),
    "rte": (
        ["hypothesis", "premise", "label"],
        _as_text("rte", ["hypothesis", "premise"], ["entailment", "not_entailment"]),
    ),
    "wic": (
        ["sentence1", "sentence2", "word", "label"],
        _as_text("wic", ["sentence1", "sentence2", "word"], _TRUE),
    ),
    "wsc": (["text", "span1_text", "span2_index", "label"], _wsc),
    "multirc_pair": (["question", "answer", "paragraph", "label"], _multirc_pair),
    "wic_pair": (["sentence1", "sentence2", "word", "label"], _wic_pair),
    "wsc_pair": (["text", "span1_text", "span2_index", "label"], _wsc_pair),
    "lama": (["sub_label", "obj_label", "predicate_id"], _lama),
    "ontonotes": (["sentences"], _ontonotes),
    "srl": (["sentences"], _srl),
}
