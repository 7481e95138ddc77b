"""Multiple choice: options as rows, the forms of COPA, SWAG and RACE, any method, options with letters in prompts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from lightning_peft import (
    LoRA,
    Method,
    MultipleChoice,
    MultipleChoiceData,
    PromptTuning,
    PTuningV2,
    TextClassificationData,
    TuningError,
)
from lightning_peft.core.hub import load_tokenizer
from lightning_peft.data.multiple_choice import FORMS, number_of
from lightning_peft.prompting import Template
from tests.modules import trainer
from tests.valley import set_up

Valley = Callable[[str], str]
COPA = {
    "premise": "ana was wet .",
    "choice1": "it was blue .",
    "choice2": "it was red .",
    "question": "cause",
    "label": 1,
}
ENDINGS = ("likes rice .", "likes soup .", "likes fish .", "likes cake .")
SWAG = {"sent1": "ana went .", "sent2": "she", "label": 2} | {f"ending{i}": end for i, end in enumerate(ENDINGS)}
RACE = {
    "article": "ana keeps a dog .",
    "question": "what ?",
    "options": ["a cat", "a dog", "a hen", "a fox"],
    "answer": "B",
}


@pytest.fixture(scope="module")
def bert(valley: Valley, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny BERT with a pooler, which the one with a language-model head lacks."""
    folder = tmp_path_factory.mktemp("chooser")
    config = hf.AutoConfig.from_pretrained(valley("bert"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf.BertForMultipleChoice(config).save_pretrained(folder)
    load_tokenizer(valley("bert")).save_pretrained(folder)
    return str(folder)


def of_rows(folder: Path, model: str, rows: list[dict[str, Any]], **kwargs: Any) -> MultipleChoiceData:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    files = {split: str(path) for split in ("train", "validation", "test")}
    return MultipleChoiceData(tokenizer=model, max_length=32, **files | kwargs)


def first(data: MultipleChoiceData) -> dict[str, Any]:
    return next(iter(set_up(data).val_dataloader()))


@pytest.mark.parametrize(
    ("form", "row", "texts", "right"),
    [
        ("copa", COPA, ["ana was wet . because", "it was blue .", "it was red ."], 1),
        ("swag", SWAG, ["ana went .", *(f"she {end}" for end in ENDINGS)], 2),
        ("race", RACE, ["ana keeps a dog .", "what ? a cat", "what ? a dog", "what ? a hen", "what ? a fox"], 1),
    ],
)
def test_forms(form: Any, row: dict[str, Any], texts: list[str], right: int, bert: str, tmp_path: Path) -> None:
    data = of_rows(tmp_path, bert, [row], form=form)
    batch = first(data)
    tokens = data.tokenizer
    expected = [tokens(texts[0], option)["input_ids"] for option in texts[1:]]
    found = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert found == expected
    assert batch["labels"].tolist() == [right]
    assert (batch["row"].tolist(), batch["option"].tolist()) == ([0] * len(expected), list(range(len(expected))))


def test_the_right_option_is_a_number_a_letter_or_a_text() -> None:
    assert [number_of(value, ["a cat", "a dog"]) for value in (1, "1", "B", "b", "a dog")] == [1] * 5
    assert number_of("1", ["3", "1"]) == 1, "a text comes first"
    for wrong in (2, "C", "a cow", -1):
        with pytest.raises(TuningError, match=r"names none of the 2 options \(a cat, a dog\): give the number from 0"):
            number_of(wrong, ["a cat", "a dog"])


def test_questions_with_unlike_many_options_score_as_they_do_alone(bert: str, tmp_path: Path) -> None:
    short = {**RACE, "options": ["a cat", "a dog"], "answer": "A"}
    task = MultipleChoice(bert).eval()
    with torch.no_grad():
        both = task(first(of_rows(tmp_path, bert, [RACE, short], form="race", bucket=False)))
        one, two = (task(first(of_rows(tmp_path, bert, [row], form="race"))) for row in (RACE, short))
        batch = first(of_rows(tmp_path, bert, [RACE], form="race"))
        whole = {name: batch[name].unsqueeze(0) for name in ("input_ids", "attention_mask")}
        assert torch.allclose(one, task.backbone(**whole).logits, atol=1e-5), "as transformers has it, [B, C, T]"
    assert torch.allclose(both[0], one[0], atol=1e-5)
    assert torch.allclose(both[1, :2], two[0], atol=1e-5)
    assert both[1, 2:].isinf().all()


@pytest.mark.parametrize("method", [PTuningV2(num_virtual_tokens=4), PromptTuning(num_virtual_tokens=3), LoRA(r=4)],
                         ids=lambda method: type(method).__name__)  # fmt: skip
def test_methods_train_on_it(method: Method, bert: str, tmp_path: Path) -> None:
    foods = ["rice", "soup", "fish", "cake"]
    told = [
        {"context": "ana eats", "question": "what ?", "options": [f"good {foods[i % 4]} .", f"stale {foods[i % 3]} ."]}
        for i in range(64)
    ]
    rows = [row | {"label": i % 2, "options": row["options"][:: 1 - 2 * (i % 2)]} for i, row in enumerate(told)]
    data = of_rows(tmp_path, bert, rows, batch_size=8)
    task, own = MultipleChoice(bert, lr=1e-2), type(method)(**method.init_args())
    run = trainer(tmp_path, own, max_epochs=4)
    before = run.validate(task, data, verbose=False)[0]
    run.fit(task, data)
    assert run.callback_metrics["val_loss"] < 0.9 * before["val_loss"]
    assert run.test(task, data, verbose=False)[0].keys() == {"test_loss", "test_accuracy"}
    answers = trainer(tmp_path, own, limit_predict_batches=1).predict(task, data)[0]
    assert set(answers["answer"]) == {"A", "B"}
    assert sum(answers["probabilities"][0]) == pytest.approx(1, abs=1e-5)


def test_options_with_letters_in_a_prompt() -> None:
    template = Template("{context} {question}\n{lettered}\nAnswer: {answer}")
    row = {"context": "ana keeps a dog .", "question": "what ?", "options": ["a cat", "a dog"]}
    assert template.prompt(row, ["A", "B"]) == "ana keeps a dog . what ?\n(A) a cat\n(B) a dog\nAnswer:"
    assert template.fields == ("context", "question", "options")
    with pytest.raises(TuningError, match="letters the options of a row, and this one has none: give a column options"):
        template.prompt({**row, "options": None})
    with pytest.raises(TuningError, match="27 options have no letter each"):
        template.prompt({**row, "options": ["a"] * 27})


def test_mistakes(bert: str, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="form='boolq' is no form of multiple choice: take plain, copa, swag, race"):
        MultipleChoiceData(tokenizer=bert, form="boolq")  # type: ignore[arg-type]
    with pytest.raises(TuningError, match=r"no template of 'plain' shows the option: write \{option\}"):
        MultipleChoiceData(tokenizer=bert, second="{question}")
    for odd, message in (
        ({"options": ["a"]}, r"it has the options \['a'\], which leave no choice: give two or more"),
        ({"options": None}, r"it has the options \[\], which leave no choice: give two or more"),
        ({"answer": "Z"}, r"'Z' names none of the \d options"),
    ):
        with pytest.raises(TuningError, match=f"^row 2 of the train split cannot be used: {message}"):
            first(of_rows(tmp_path, bert, [RACE, {**RACE, **odd}], form="race"))
    with pytest.raises(
        TuningError, match=r"^row 1 of the train split cannot be used: it has 'a, b' for its options: give"
    ):
        first(of_rows(tmp_path, bert, [{**RACE, "options": "a, b"}], form="race"))
    with pytest.raises(TuningError, match="has no options to choose from: use MultipleChoiceData"):
        MultipleChoice(bert).check_data(TextClassificationData(tokenizer=bert), "fit")
    assert set(FORMS) == {"plain", "copa", "swag", "race"}
