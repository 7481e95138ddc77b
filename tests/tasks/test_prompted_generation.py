"""Frozen models that write their answers: directly, after a rationale, by a vote."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft import TuningError
from lightning_peft.data import Seq2SeqData
from lightning_peft.prompting.encoding import text_ids
from lightning_peft.tasks.prompted_generation import PromptedGeneration
from lightning_peft.tasks.sampling import Written
from tests import models, text
from tests.modules import trainer
from tests.processes import run_module
from tests.tasks import written_two_processes

TEMPLATE = "Q: {source}\nA: {answer}"


@pytest.fixture(scope="module")
def lms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {}
    for kind in ("gpt2", "llama", "t5"):
        folder = tmp_path_factory.mktemp(kind)
        models.tiny(kind).save_pretrained(folder)
        found[kind] = str(models.save_tokenizer(folder))
    return found


def data(model: str, folder: Path, **kwargs: Any) -> Seq2SeqData:
    """Return rows that ask for a number, with rationales."""
    sizes = {"train": 12, "validation": 4, "test": 5}
    for split, count in sizes.items():
        draw = text.sentences(count, seed=len(split), longest=5)
        rows = [
            {"source": f"{row['text']} {split}{i}", "target": str(i), "why": f"good {split}{i} ."}
            for i, row in enumerate(draw)
        ]
        text.write(folder / f"{split}.jsonl", rows)
    files = {split: str(folder / f"{split}.jsonl") for split in sizes}
    return Seq2SeqData(**{"tokenizer": model, "batch_size": 3, "max_length": 32} | files | kwargs)


def task(model: str, template: str | list[str] = TEMPLATE, **kwargs: Any) -> PromptedGeneration:
    defaults = {"target": "target", "answer": "number", "max_new_tokens": 6, "max_answer_tokens": 4}
    return PromptedGeneration(model, template, **defaults | kwargs)


def says(module: PromptedGeneration, texts: list[str], scores: list[float] | None = None) -> list[list[str]]:
    """Let a module write these texts in turn, and return the prompts that it is given."""
    prompts: list[list[str]] = []
    scores = scores or [0.0] * len(texts)
    turn = iter(list(zip(texts, scores, strict=True)) * 50)
    decode = {}

    def write(model: Any, ids: Any, mask: Any, most: int, paths: int) -> list[Written]:
        prompts.append([module.tokenizer.decode(row[kept.bool()]) for row, kept in zip(ids, mask, strict=True)])
        found = []
        for _ in range(len(ids) * (paths or 1)):
            words, score = next(turn)
            decode[len(decode)] = words
            found.append(Written([len(decode) - 1], score))
        return found

    module.sampler.write = write  # type: ignore[method-assign]
    module.sampler.text = lambda path: decode[path.ids[0]].split(module.stop)[0] if module.stop else decode[path.ids[0]]  # type: ignore[method-assign]
    return prompts


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_greedy_texts_are_those_of_single_prompts(kind: str, lms: dict[str, str], tmp_path: Path) -> None:
    module = task(lms[kind], answer="text", paths=1)
    batches = trainer(tmp_path).predict(module, data(lms[kind], tmp_path))
    assert batches is not None
    tests = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    columns = {name: [value for b in batches for value in b[name]] for name in ("prompt", "text", "scores")}
    found = [(prompt, *words, *score) for prompt, words, score in zip(*columns.values(), strict=True)]
    tokens, model = module.tokenizer, module.backbone
    assert len(found) == 5
    for row, (prompt, words, score) in zip(tests, found, strict=True):
        assert prompt == f"Q: {row['source']}\nA:"
        ids = [tokens.cls_token_id, *text_ids(tokens, prompt)] + ([tokens.sep_token_id] if kind == "t5" else [])
        out = model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
            max_new_tokens=6, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        new = out.sequences[0, 1 if kind == "t5" else len(ids) :]
        assert words == tokens.decode(new, skip_special_tokens=True)
        likely = [logits[0].log_softmax(-1)[token].item() for logits, token in zip(out.logits, new, strict=True)]
        assert score == pytest.approx(sum(likely) / len(likely), abs=1e-4)


def test_the_answer_is_found_and_scored(lms: dict[str, str], tmp_path: Path) -> None:
    module = task(lms["gpt2"])
    says(module, ["0.", "The answer is 1", "two", "so it is 3 3", "9"])  # in the order of the rows, by length or not
    rows = data(lms["gpt2"], tmp_path, bucket=False)
    (logged,) = trainer(tmp_path).test(module, rows, verbose=False)
    assert logged == pytest.approx({"test_exact_match": 3 / 5, "test_answered": 4 / 5})


def test_no_answer_at_all(lms: dict[str, str], tmp_path: Path) -> None:
    module = task(lms["gpt2"])
    says(module, ["none"])
    with pytest.warns(UserWarning, match="no text held an answer of kind number: look at the texts"):
        (logged,) = trainer(tmp_path).test(module, data(lms["gpt2"], tmp_path), verbose=False)
    assert logged == {"test_exact_match": 0.0, "test_answered": 0.0}
    (batch, _) = trainer(tmp_path).predict(module, data(lms["gpt2"], tmp_path))
    assert batch["answer"] == [None] * 3
    assert batch["text"] == [["none"]] * 3


def test_few_shot_demonstrations_show_their_rationales(lms: dict[str, str], tmp_path: Path) -> None:
    module = task(lms["gpt2"], demonstrations=2, rationale="why")
    says(module, ["There are 3 and 4. The answer is 7.\n\nQ: 5"])
    (batch, _) = trainer(tmp_path).predict(module, data(lms["gpt2"], tmp_path))
    train = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    shown = {f"Q: {row['source']}\nA: {row['why']} The answer is {row['target']}." for row in train}
    parts = batch["prompt"][0].split("\n\n")
    assert len(parts) == 3
    assert set(parts[:2]) <= shown
    assert parts[2].endswith("\nA:")
    assert batch["answer"][0] == "7"
    assert batch["text"][0] == ["There are 3 and 4. The answer is 7."]


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_two_stages(kind: str, lms: dict[str, str], tmp_path: Path) -> None:
    module = task(lms[kind], reasoning="zero_shot", trigger="good film .", ask="music of")
    prompts = says(module, ["light water", "sun", "house", "8 is it, or 9", "5", "none"])
    (batch, _) = trainer(tmp_path).predict(module, data(lms[kind], tmp_path))
    first, second = prompts[0], prompts[1]
    end = " [SEP]" if kind == "t5" else ""
    assert all(prompt.endswith(f"good film [UNK]{end}") for prompt in first)
    assert second == [
        one.removesuffix(end) + f" {why} music of{end}"
        for one, why in zip(first, ["light water", "sun", "house"], strict=True)
    ]
    assert batch["text"] == [["light water"], ["sun"], ["house"]]
    assert batch["answer"] == ["8", "5", None]
    assert batch["prompt"][0].endswith("\nA: good film .")


def test_the_words_of_the_paper(lms: dict[str, str]) -> None:
    module = task(lms["gpt2"], reasoning="zero_shot")
    assert (module.trigger, module.ask) == ("Let's think step by step.", "Therefore, the answer (arabic numerals) is")
    assert module.prompts.ask == " \nTherefore, the answer (arabic numerals) is"


def test_self_consistency(lms: dict[str, str], tmp_path: Path) -> None:
    module = task(lms["gpt2"], paths=5, temperature=0.7)
    says(module, ["1", "2", "none", "2", "none"], [-1.0, -9.0, 0.0, -9.0, 0.0])
    (batch, _) = trainer(tmp_path).predict(module, data(lms["gpt2"], tmp_path))
    assert batch["answer"] == ["2"] * 3
    assert batch["answers"][0] == ["1", "2", None, "2", None]
    tied = task(lms["gpt2"], paths=2, temperature=0.7)
    says(tied, ["1", "2"], [-2.0, -1.0])
    (batch, _) = trainer(tmp_path).predict(tied, data(lms["gpt2"], tmp_path))
    assert batch["answer"] == ["2"] * 3


RIGHT, IDLE, WRONG = "9 - 7 = 2. 2 + 8 = 10. The answer is 10.", "1 + 1 = 2. 3 + 4 = 7. So 7", "9 - 7 = 3. So 5"


@pytest.mark.parametrize(("check", "answer"), [("note", "5"), ("filter", "10")])
def test_sums_are_worked_out_anew(check: str, answer: str, lms: dict[str, str], tmp_path: Path) -> None:
    module = task(lms["gpt2"], paths=4, temperature=0.7, check=check, rationale="why")
    rows = data(lms["gpt2"], tmp_path, batch_size=5)
    says(module, [WRONG, RIGHT, WRONG, IDLE], [-1.0, -1.0, -1.0, -2.0])
    (batch,) = trainer(tmp_path).predict(module, rows)
    assert batch["answer"] == [answer] * 5
    assert batch["answers"][0] == ["5", "10", "5", "7"]
    assert batch["steps"][0] == [
        {"wrong": ["9 - 7 = 3"], "unused": ["9 - 7 = 3"], "consistent": False},
        {"wrong": [], "unused": [], "consistent": True},
        {"wrong": ["9 - 7 = 3"], "unused": ["9 - 7 = 3"], "consistent": False},
        {"wrong": [], "unused": ["1 + 1 = 2"], "consistent": True},
    ]
    says(module, [WRONG, RIGHT, WRONG, IDLE])
    (logged,) = trainer(tmp_path).test(module, rows, verbose=False)
    assert logged["test_wrong_steps"] == pytest.approx(0.5)
    says(module, [WRONG])
    (batch,) = trainer(tmp_path).predict(module, rows)
    assert batch["answer"] == ["5"] * 5, "where no rationale holds, all vote"


def test_sampling_depends_on_seed_and_rows_alone(lms: dict[str, str], tmp_path: Path) -> None:
    rows = data(lms["gpt2"], tmp_path)
    options = {"paths": 3, "temperature": 1.0, "answer": "text"}

    def texts(**kwargs: Any) -> list[Any]:
        torch.manual_seed(torch.initial_seed() + 1)
        return [batch["text"] for batch in trainer(tmp_path).predict(task(lms["gpt2"], **options | kwargs), rows)]

    one = texts()
    assert one == texts()
    assert one != texts(seed=1)
    assert len({words for batch in one for row in batch for words in row}) > 5
    greedy = texts(paths=1, temperature=0.0)
    nearly = texts(paths=1, temperature=1e-4)
    assert greedy == nearly


def test_several_templates_vote(lms: dict[str, str], tmp_path: Path) -> None:
    module = task(lms["gpt2"], [TEMPLATE, "{source} of {answer}"])
    rows = data(lms["gpt2"], tmp_path, bucket=False, batch_size=5)
    says(module, ["0", "1", "2", "3", "4", "0", "9", "9", "9", "9"])
    (logged,) = trainer(tmp_path).test(module, rows, verbose=False)
    assert logged["test_exact_match/1"] == 1.0
    assert logged["test_exact_match/2"] == pytest.approx(0.2)
    assert logged["test_exact_match"] == pytest.approx(0.6)
    spread = {name: logged[f"test_exact_match_{name}"] for name in ("std", "min", "max")}
    assert spread == pytest.approx({"std": 0.4, "min": 0.2, "max": 1.0})
    says(module, ["0", "1", "2", "3", "4", "0", "9", "9", "9", "9"])
    (batch,) = trainer(tmp_path).predict(module, rows)
    assert batch["answer"] == ["0", "1", "2", "3", "4"]
    assert batch["answers"][1] == ["1", "9"]
    assert len(batch["prompt"][0]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": 3}, "paths=3 of temperature=0 are all the same: take a temperature"),
        ({"paths": 0}, "paths=0 is out of range: take 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is out of range"),
        ({"template": "{source} {answer} end"}, "has words behind the answer, which are not written"),
        ({"answer": "date"}, "kind='date' is no kind of answer"),
        ({"answer": "text", "check": "note"}, "check='note' compares sums with an answer of kind text: set answer="),
    ],
)
def test_mistakes(options: dict, message: str, lms: dict[str, str]) -> None:
    with pytest.raises(TuningError, match=message):
        task(lms["gpt2"], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "answer"}, r"a row has no answer in column 'answer' \(it has source, target, why\)"),
        ({"target": "why", "answer": "yes_no"}, "the right answer 'good test.*' holds no yes_no"),
        ({"rationale": "because", "demonstrations": 2}, "has no rationale in column 'because'"),
        ({"max_new_tokens": 64}, "what the model may write takes 64 of its 64 tokens: lower max_new_tokens"),
        ({"template": "{question} {answer}"}, "asks for 'question', rows have source, target, why"),
    ],
)
def test_mistakes_that_the_data_show(options: dict, message: str, lms: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=message):
        trainer(tmp_path).test(task(lms["gpt2"], **options), data(lms["gpt2"], tmp_path), verbose=False)


def test_a_masked_model_writes_nothing(tmp_path: Path) -> None:
    import transformers as hf

    hf.BertForMaskedLM(models.tiny("bert").config).save_pretrained(tmp_path)
    models.save_tokenizer(tmp_path)
    with pytest.raises(
        TuningError, match=r"has 0 masks: a cloze needs one|is a masked language model, which writes no"
    ):
        task(str(tmp_path))
    with pytest.raises(TuningError, match="is a masked language model, which writes no texts"):
        task(str(tmp_path), "{source} {mask}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_two_processes_write_what_one_writes(kind: str, lms: dict[str, str], tmp_path: Path) -> None:
    data(lms[kind], tmp_path)
    run_module("tests.tasks.written_two_processes", lms[kind], tmp_path, folder=tmp_path)
    two, rows = json.loads((tmp_path / "two.json").read_text()), (tmp_path / "two.jsonl").read_text().splitlines()
    one = written_two_processes.run(lms[kind], tmp_path, 1)
    assert two == pytest.approx(one, abs=1e-6)
    for number, (left, right) in enumerate(zip(rows, (tmp_path / "one.jsonl").read_text().splitlines(), strict=True)):
        left, right = json.loads(left), json.loads(right)
        assert left.pop("scores") == pytest.approx(right.pop("scores"), abs=1e-4)
        assert left == right
        assert left["row"] == number
