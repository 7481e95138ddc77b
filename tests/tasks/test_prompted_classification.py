"""Frozen language models that classify by words: under the data modules, metrics and commands of the trained tasks."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from lightning_peft import LoRA, PromptTuning, TuningError
from lightning_peft.prompting.encoding import text_ids
from lightning_peft.tasks.prompted_classification import PromptedClassification
from tests import models, text
from tests.modules import trainer
from tests.processes import run_module
from tests.tasks import prompted_two_processes
from tests.text import NAMES

WORDS: dict[str, str | list[str]] = {"nature": ["river", "bird"], "people": "people", "sound": "music"}
CLOZE = "{text} in the {mask} of light"
PREFIX = "{text} of {answer}"
KINDS = ("bert", "gpt2", "llama", "t5")


def save(folder: Path, kind: str) -> str:
    """Save a tiny language model whose tokenizer suits it."""
    model: Any = models.tiny(kind)
    if kind == "bert":
        torch.manual_seed(0)
        model = hf.BertForMaskedLM(model.config).eval()
    model.save_pretrained(folder)
    models.save_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def lms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {kind: save(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def task(model: str, templates: Any = None, **kwargs: Any) -> PromptedClassification:
    masked = "BertForMaskedLM" in (Path(model) / "config.json").read_text()
    named = {"words": WORDS, "labels": NAMES} | kwargs
    return PromptedClassification(model, (CLOZE if masked else PREFIX) if templates is None else templates, **named)


def short_data(model: str, folder: Path, **kwargs: Any) -> Any:
    """Return rows of one to three words, each with its number, so that no two are equal."""
    for seed, (split, count) in enumerate({"train": 30, "validation": 9, "test": 8}.items()):
        rows = [row | {"text": f"{row['text']} {split}{i}"} for i, row in enumerate(text.sentences(count, seed, 3))]
        text.write(folder / f"{split}.jsonl", rows)
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    return text.TextClassificationData(**{"tokenizer": model, "batch_size": 4, "max_length": 32} | files | kwargs)


def first(label: str) -> str:
    words = WORDS[label]
    return words if isinstance(words, str) else words[0]


def scores_of(module: PromptedClassification, data: Any) -> tuple[Tensor, list[dict]]:
    """Return log p of the labels of all test rows [N, K, C], and the rows."""
    found, rows = [], []
    forward = module.forward

    def kept(batch: Any) -> Tensor:
        out = forward(batch)
        found.append(out)
        rows.extend(batch["fields"])
        return out

    module.forward = kept  # type: ignore[method-assign]
    try:
        trainer(Path()).test(module, data, verbose=False)
    finally:
        module.forward = forward  # type: ignore[method-assign]
    return torch.cat(found), rows


def ids(tokenizer: Any, words: str) -> list[int]:
    return tokenizer(words, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def by_hand(module: PromptedClassification, prompt: str, word: str) -> float:
    """Return log p of one word, the prompt alone in its batch."""
    tokens, model = module.tokenizer, module.backbone
    (token,) = ids(tokenizer=tokens, words=word)
    if module.lm == "masked":
        batch = tokens(prompt.replace("{mask}", "[MASK]"), return_tensors="pt")
        at = (batch["input_ids"][0] == tokens.mask_token_id).nonzero().item()
        return model(**batch).logits[0, at].log_softmax(-1)[token].item()
    if module.lm == "causal":
        sequence = torch.tensor([[tokens.cls_token_id, *text_ids(tokens, prompt)]])
        return model(input_ids=sequence).logits[0, -1].log_softmax(-1)[token].item()
    batch = tokens(prompt, return_tensors="pt")
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=torch.tensor([[0]])
    ).logits
    return logits[0, -1].log_softmax(-1)[token].item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("combine", ["mean", "max", "sum"])
def test_scores_are_those_of_single_prompts(kind: str, combine: str, lms: dict[str, str], tmp_path: Path) -> None:
    module = task(lms[kind], combine=combine)
    found, rows = scores_of(module, text.data(lms[kind], tmp_path, other=7))
    template = CLOZE if kind == "bert" else PREFIX.replace(" {answer}", "")
    assert found.shape == (7, 1, 3)
    for i, row in enumerate(rows):
        prompt = template.replace("{text}", row["text"])
        one = {word: by_hand(module, prompt, word) for word in ("river", "bird", "people", "music")}
        pair = one["river"], one["bird"]
        nature = {"mean": sum(pair) / 2, "max": max(pair), "sum": math.log(sum(map(math.exp, pair)))}[combine]
        expected = torch.tensor([nature, one["people"], one["music"]]).log_softmax(-1)
        assert torch.allclose(found[i, 0], expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_logged_scores(kind: str, lms: dict[str, str], tmp_path: Path) -> None:
    module, data = task(lms[kind]), text.data(lms[kind], tmp_path)
    (logged,) = trainer(tmp_path).test(module, data, verbose=False)
    assert logged.keys() == {"test_loss", "test_accuracy", "test_f1"}
    found, rows = scores_of(module, data)
    labels = torch.tensor([NAMES.index(row["label"]) for row in rows])
    assert logged["test_accuracy"] == pytest.approx((found[:, 0].argmax(1) == labels).float().mean().item())
    assert logged["test_loss"] == pytest.approx(-found[range(len(rows)), 0, labels].mean().item(), rel=1e-5)
    assert module.confusion_matrix().sum() == len(rows) == 21
    (validated,) = trainer(tmp_path).validate(module, data, verbose=False)
    assert validated.keys() == {"val_loss", "val_accuracy", "val_f1"}
    assert not [name for name, p in module.named_parameters() if p.requires_grad]


def test_the_data_module_is_as_it_was(lms: dict[str, str], tmp_path: Path) -> None:
    data = text.data(lms["bert"], tmp_path)
    trainer(tmp_path).test(task(lms["bert"]), data, verbose=False)
    data.setup("test")
    assert "input_ids" in next(iter(data.test_dataloader()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("select", ["random", "balanced", "nearest"])
def test_demonstrations(kind: str, select: str, lms: dict[str, str], tmp_path: Path) -> None:
    options = {"demonstrations": 3, "select": select, "instruction": "the film", "separator": " of "}
    data = short_data(lms[kind], tmp_path)
    (row, _) = trainer(tmp_path).predict(task(lms[kind], **options), data)
    assert row["demonstrations"] == [3] * 4
    template = CLOZE if kind == "bert" else PREFIX
    train = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    tests = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    labels = set()
    for prompt, asked in zip(row["prompt"], tests, strict=False):
        assert prompt.startswith("the film of ")
        shown = [r for r in train if template.replace("{text}", r["text"]).split("{")[0] in prompt]
        labels |= {r["label"] for r in shown}
        assert len(shown) == 3
        for r in shown:
            assert template.format(text=r["text"], mask=first(r["label"]), answer=first(r["label"])) + " of " in prompt
        query = template.format(text=asked["text"], mask="[MASK]", answer="").rstrip()
        assert prompt.endswith(query)
        assert asked["label"] not in query
    assert select != "balanced" or labels == set(NAMES)
    (again, _) = trainer(tmp_path).predict(task(lms[kind], **options), data)
    assert again["prompt"] == row["prompt"]
    (other, _) = trainer(tmp_path).predict(task(lms[kind], **options, seed=5), data)
    assert other["prompt"] != row["prompt"]


def test_the_nearest_stands_last(lms: dict[str, str], tmp_path: Path) -> None:
    data = short_data(lms["gpt2"], tmp_path)
    found = {}
    for order in ("nearest_last", "nearest_first"):
        module = task(lms["gpt2"], demonstrations=2, select="nearest", order=order, separator=" | ")
        found[order] = trainer(tmp_path).predict(module, data)[0]["prompt"][0].split(" | ")
    assert found["nearest_last"][:2] == found["nearest_first"][:2][::-1]
    nearest = found["nearest_first"][0].rsplit(" of ", 1)[0]
    train = [json.loads(line)["text"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    asked = json.loads((tmp_path / "test.jsonl").read_text().splitlines()[0])["text"]
    with torch.no_grad():
        embedded = module._embed([asked, *train])
    assert train[int((embedded[1:] @ embedded[0]).argmax())] == nearest


def test_demonstrations_without_answers(lms: dict[str, str], tmp_path: Path) -> None:
    module = task(lms["gpt2"], demonstrations=2, show_answers=False, separator=" | ")
    prompt = trainer(tmp_path).predict(module, short_data(lms["gpt2"], tmp_path))[0]["prompt"][0]
    assert [part.endswith(" of") for part in prompt.split(" | ")] == [True] * 3


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("options", [{}, {"select": "nearest"}, {"calibrate": True}, {"normalise": "pmi"}], ids=str)
def test_a_shared_prefix_changes_nothing(kind: str, options: dict, lms: dict[str, str], tmp_path: Path) -> None:
    words = {"nature": ["river bird", "stone"], "people": "people of the house", "sound": "music"}
    data = short_data(lms[kind], tmp_path)
    settings = {"demonstrations": 4, "words": words} | options
    shared, full = (scores_of(task(lms[kind], **settings, share_prefix=share), data)[0] for share in (True, False))
    assert torch.allclose(shared, full, atol=1e-4)  # differences of log-likelihoods of about 20


def test_what_does_not_fit_is_dropped_whole(lms: dict[str, str], tmp_path: Path) -> None:
    data = short_data(lms["gpt2"], tmp_path)
    with pytest.warns(UserWarning, match=r"\d of 5 demonstrations are left out, as prompts have at most 24 tokens"):
        rows = trainer(tmp_path).predict(task(lms["gpt2"], demonstrations=5, max_length=24, separator=" | "), data)
    whole = trainer(tmp_path).predict(task(lms["gpt2"], demonstrations=5, separator=" | "), data)
    shown = [count for batch in rows for count in batch["demonstrations"]]
    assert all(0 < count < 5 for count in shown)
    prompts, complete = ([p for batch in found for p in batch["prompt"]] for found in (rows, whole))
    for prompt, longer, count in zip(prompts, complete, shown, strict=True):
        assert prompt.count(" | ") == count
        assert longer.endswith(prompt)
    with pytest.warns(UserWarning, match="are left out"):
        (logged,) = trainer(tmp_path).test(
            task(lms["gpt2"], demonstrations=5, max_length=24, separator=" | "), data, verbose=False
        )
    assert logged["test_demonstrations"] == pytest.approx(sum(shown) / len(shown))


@pytest.mark.parametrize("mean", ["raw", "normalised"])
def test_calibration_by_hand(mean: str, lms: dict[str, str], tmp_path: Path) -> None:
    data, words = text.data(lms["gpt2"], tmp_path, other=5), {"nature": "river", "people": "people", "sound": "music"}
    module = task(lms["gpt2"], calibrate=True, words=words, content_free_mean=mean)
    found, rows = scores_of(module, data)

    def labels(value: str, raw: bool = False) -> Tensor:
        likely = torch.tensor([by_hand(module, f"{value} of", word) for word in words.values()]).exp()
        return likely if raw else likely / likely.sum()

    prior = torch.stack([labels(value, raw=mean == "raw") for value in ("N/A", "[MASK]", "")]).mean(0)
    for row, scores in zip(rows, found, strict=True):
        weighted = labels(row["text"]) / (prior / prior.sum())
        assert torch.allclose(scores[0].exp(), weighted / weighted.sum(), atol=1e-5)


def test_pmi_by_hand(lms: dict[str, str], tmp_path: Path) -> None:
    data, words = text.data(lms["gpt2"], tmp_path, other=5), {"nature": "river", "people": "people", "sound": "music"}
    module = task(lms["gpt2"], normalise="pmi", words=words)
    found, rows = scores_of(module, data)
    for row, scores in zip(rows, found, strict=True):
        pmi = [by_hand(module, f"{row['text']} of", word) - by_hand(module, "of", word) for word in words.values()]
        assert torch.allclose(scores[0], torch.tensor(pmi).log_softmax(0), atol=1e-5)


def test_the_mean_over_tokens(lms: dict[str, str], tmp_path: Path) -> None:
    data, words = (
        text.data(lms["gpt2"], tmp_path, other=5),
        {"nature": "river bird", "people": "people", "sound": "music"},
    )
    total, mean = (task(lms["gpt2"], words=words, normalise=how) for how in ("sum", "mean"))
    for module in (total, mean):
        module.verbalizer.combine = "max"
    difference = scores_of(mean, data)[0] - scores_of(total, data)[0]
    odds = difference[:, 0, 0] - difference[:, 0, 1]
    raw = scores_of(total, data)[0]
    assert (odds > 0).all()  # half of a negative number
    assert torch.allclose(difference[:, 0, 1] - difference[:, 0, 2], torch.zeros(5), atol=1e-5)
    assert raw.shape == (5, 1, 3)


def test_words_of_several_tokens_in_a_cloze(lms: dict[str, str], tmp_path: Path) -> None:
    words = {"nature": "river bird", "people": "people", "sound": "music"}
    data = text.data(lms["bert"], tmp_path, other=5)
    with pytest.raises(TuningError, match=r"'river bird' is 2 tokens \(river, bird\): give a word of one token"):
        task(lms["bert"], words=words)
    single, _ = scores_of(task(lms["bert"], words=words | {"nature": "river"}), data)
    for decoding in ("confident", "parallel", "left_to_right"):
        several, _ = scores_of(task(lms["bert"], words=words, multi_token=True, decoding=decoding), data)
        odds = several[:, 0, 1] - several[:, 0, 2]
        assert torch.allclose(odds, single[:, 0, 1] - single[:, 0, 2], atol=1e-5)


def test_truncation_keeps_template_and_mask(lms: dict[str, str], tmp_path: Path) -> None:
    module = task(lms["bert"], max_length=9)
    rows, _ = [{"text": "good film music people time water light"}], None
    batch = module.on_before_batch_transfer({"fields": rows}, 0)
    shown = module.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert shown == ["[CLS]", "good", "film", "in", "the", "[MASK]", "of", "light", "[SEP]"]


def test_several_templates(lms: dict[str, str], tmp_path: Path) -> None:
    texts = ["{text} of {answer}", "the {text} in the {answer}", "{text} to the {answer}"]
    data = short_data(lms["gpt2"], tmp_path)
    module = task(lms["gpt2"], texts)
    (logged,) = trainer(tmp_path).test(module, data, verbose=False)
    single = [trainer(tmp_path).test(task(lms["gpt2"], one), data, verbose=False)[0] for one in texts]
    for name in ("accuracy", "f1", "loss"):
        each = torch.tensor([scores[f"test_{name}"] for scores in single])
        found = [logged[f"test_{name}{end}"] for end in ("", "_std", "_min", "_max")]
        wanted = [each.mean(), each.std(correction=0), each.min(), each.max()]
        assert found == pytest.approx([value.item() for value in wanted], abs=1e-5)
    assert [logged[f"test_accuracy/{i}"] for i in (1, 2, 3)] == pytest.approx([s["test_accuracy"] for s in single])
    dev = [trainer(tmp_path).validate(task(lms["gpt2"], one), data, verbose=False)[0]["val_accuracy"] for one in texts]
    best = max(range(3), key=lambda i: dev[i])
    assert module.best_template == str(best + 1)
    assert logged["test_accuracy_best"] == pytest.approx(single[best]["test_accuracy"])
    assert module.confusion_matrix().sum() == 3 * 8
    (first_batch, _) = trainer(tmp_path).predict(module, data)
    assert len(first_batch["prompt"][0]) == 3


def test_templates_of_a_file(lms: dict[str, str], tmp_path: Path) -> None:
    lines = ["task: topics", "templates:", "  ask: '{text} {options} {answer}'", "  write: 'a {label} is'"]
    lines += ["inverse: [write]", "words: {nature: river, people: people, sound: music}"]
    (tmp_path / "topics.yaml").write_text("\n".join(lines))
    module = PromptedClassification(lms["gpt2"], str(tmp_path / "topics.yaml"), labels=NAMES)
    assert [template.name for template in module.templates] == ["ask"]
    prompt = trainer(tmp_path).predict(module, short_data(lms["gpt2"], tmp_path))[0]["prompt"][0]
    assert prompt.endswith("OPTIONS:\n- river\n- people\n- music")
    (tmp_path / "topics.yaml").write_text("\n".join([*lines[:2], lines[3], *lines[4:]]))
    with pytest.raises(TuningError, match="all templates are inverse and none is scored"):
        PromptedClassification(lms["gpt2"], str(tmp_path / "topics.yaml"), labels=NAMES)


def test_a_delta_is_asked_like_any_model(lms: dict[str, str], tmp_path: Path) -> None:
    """With a method, the same prompts go to the tuned model: an untrained LoRA changes nothing, a soft prompt does."""
    data = short_data(lms["gpt2"], tmp_path)
    (plain,) = trainer(tmp_path).test(task(lms["gpt2"]), data, verbose=False)
    (with_lora,) = trainer(tmp_path, LoRA(r=2)).test(task(lms["gpt2"]), data, verbose=False)
    assert with_lora == plain


@pytest.mark.parametrize("options", [{}, {"calibrate": True}, {"normalise": "pmi"}], ids=str)
def test_words_and_a_soft_prompt_of_these_words_are_on_one_footing(
    options: dict, lms: dict[str, str], tmp_path: Path
) -> None:
    """A manual prompt, and the soft prompt that begins at its embeddings, before it trains."""
    data = short_data(lms["bert"], tmp_path)
    soft = PromptTuning(num_virtual_tokens=3, init="text", text="good film music", tokenizer=lms["bert"])
    (with_prompt,) = trainer(tmp_path, soft).test(task(lms["bert"], **options), data, verbose=False)
    (with_words,) = trainer(tmp_path).test(
        task(lms["bert"], f"good film music {CLOZE}", **options), data, verbose=False
    )
    (plain,) = trainer(tmp_path).test(task(lms["bert"], **options), data, verbose=False)
    assert with_prompt == pytest.approx(with_words, rel=1e-5, abs=1e-5)
    assert with_prompt["test_loss"] != pytest.approx(plain["test_loss"], abs=1e-4)


@pytest.mark.slow
def test_two_processes_score_like_one(lms: dict[str, str], tmp_path: Path) -> None:
    short_data(lms["gpt2"], tmp_path)
    run_module("tests.tasks.prompted_two_processes", lms["gpt2"], tmp_path, folder=tmp_path)
    two = json.loads((tmp_path / "two.json").read_text())
    rows = (tmp_path / "two.jsonl").read_text()
    one = prompted_two_processes.run(lms["gpt2"], tmp_path, 1)
    assert one is not None
    assert two.pop("confusions") == one.pop("confusions")
    assert two == pytest.approx(one, rel=1e-5)
    pairs = zip(rows.splitlines(), (tmp_path / "one.jsonl").read_text().splitlines(), strict=True)
    for number, (left, right) in enumerate((json.loads(a), json.loads(b)) for a, b in pairs):
        assert left.pop("scores") == pytest.approx(right.pop("scores"), rel=1e-5, abs=1e-5)
        assert left == right
        assert left["row"] == number


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"templates": "{text} {mask} {mask}"}, "has 2 masks: a cloze needs one"),
        ({"templates": "{text} of"}, "has 0 masks: a cloze needs one"),
        ({"templates": "{v:3} {text} {mask}"}, "has virtual tokens, which nothing trains here"),
        ({"templates": []}, "there is no template: give one or more"),
        ({"templates": "no.yaml"}, "no.yaml is no file"),
        ({"words": {"nature": "river", "people": "people"}}, "the verbalizer has no word for 'sound'"),
        ({"words": WORDS | {"sound": "people"}}, "labels 'people' and 'sound' share the word 'people'"),
        ({"words": WORDS | {"sound": "entailment"}}, "the word 'entailment' is unknown to the tokenizer"),
        ({"demonstrations": -1}, "demonstrations=-1 and seed=0 are out of range"),
        ({"calibrate": True, "content_free": []}, "are too few: take 1 or more"),
        ({"words": None, "labels": None}, "there are no labels: give words= or labels="),
    ],
)
def test_mistakes(options: dict, message: str, lms: dict[str, str]) -> None:
    with pytest.raises(TuningError, match=message):
        task(lms["bert"], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"templates": "{txt} {answer}"}, "asks for 'txt', rows have text, label: did you mean 'text'"),
        ({"demonstrations": 31}, "31 demonstrations cannot be drawn from 30 rows"),
        ({"demonstrations": 31, "select": "nearest"}, "31 demonstrations cannot be drawn from 30 rows"),
        ({"demonstrations": 2, "order": "nearest_last"}, "order=nearest_last needs select=nearest"),
        ({"demonstrations": 2, "instruction": "the " * 70}, "leaves no room for a question"),
        ({"max_length": 2}, "beyond the limit of"),
    ],
)
def test_mistakes_that_the_data_show(options: dict, message: str, lms: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=message):
        trainer(tmp_path).test(task(lms["gpt2"], **options), short_data(lms["gpt2"], tmp_path), verbose=False)


@pytest.mark.parametrize("select", ["random", "nearest"])
def test_demonstrations_that_hold_the_test_row(select: str, lms: dict[str, str], tmp_path: Path) -> None:
    data = short_data(lms["gpt2"], tmp_path)
    (tmp_path / "train.jsonl").write_text((tmp_path / "test.jsonl").read_text())
    with pytest.raises(TuningError, match=r"a demonstration is the row that is asked about \(text='"):
        trainer(tmp_path).test(task(lms["gpt2"], demonstrations=3, select=select), data, verbose=False)


def test_nothing_trains(lms: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="PromptedClassification trains nothing: run validate, test or predict"):
        trainer(tmp_path).fit(task(lms["gpt2"]), short_data(lms["gpt2"], tmp_path))


def test_no_language_model(lms: dict[str, str], tmp_path: Path) -> None:
    bert = models.tiny("bert")
    bert.bert.save_pretrained(tmp_path / "encoder")
    models.save_tokenizer(tmp_path / "encoder")
    name = str(tmp_path / "encoder")
    with pytest.raises(TuningError, match=r"was saved as BertModel, which has no language-model head: take a masked"):
        PromptedClassification(name, CLOZE, words=WORDS)
    with pytest.raises(TuningError, match=r"has no weights for \d+ tensors of BertForMaskedLM, e.g. cls.predictions"):
        PromptedClassification(name, CLOZE, words=WORDS, lm="masked")
    with pytest.raises(TuningError, match="no language model can be made of 'nowhere'"):
        PromptedClassification("nowhere", CLOZE, words=WORDS)


def test_no_mask_token(lms: dict[str, str], tmp_path: Path) -> None:
    model = hf.BertForMaskedLM.from_pretrained(lms["bert"])
    model.save_pretrained(tmp_path / "no_mask")
    tokenizer = hf.AutoTokenizer.from_pretrained(lms["bert"])
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path / "no_mask")
    module = PromptedClassification(str(tmp_path / "no_mask"), CLOZE, words=WORDS)
    with pytest.raises(TuningError, match="the tokenizer has no mask token, which a cloze needs"):
        module.on_before_batch_transfer({"fields": [{"text": "good"}]}, 0)


def test_batches_without_text(lms: dict[str, str], tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader([{"input_ids": torch.ones(3)}])
    with pytest.raises(TuningError, match="a batch with input_ids has no rows as text: take a data module of this"):
        trainer(tmp_path).test(task(lms["gpt2"]), loader, verbose=False)


def test_batches_of_any_loader(lms: dict[str, str], tmp_path: Path) -> None:
    rows = [{"fields": [{"text": "good river"}], "labels": torch.tensor([0])}]
    loader = torch.utils.data.DataLoader(rows, batch_size=None)
    (logged,) = trainer(tmp_path).test(task(lms["gpt2"]), loader, verbose=False)
    assert logged["test_loss"] > 0
    with pytest.raises(TuningError, match="demonstrations come from training rows, and the data have none"):
        trainer(tmp_path).test(task(lms["gpt2"], demonstrations=2), loader, verbose=False)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    from lightning_peft.commands.running import run

    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    monkeypatch.setattr(sys, "argv", ["lightning-peft", *arguments, *quiet])
    run()


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.parametrize("name", ["prompted_classification", "prompted_generation", "nearest_demonstrations"])
def test_from_the_command_line(
    name: str, lms: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shipped configs test and predict; made rows are cut to few, so that it takes seconds."""
    config = Path(__file__).parents[2] / f"configs/tasks/{name}.yaml"
    given = ["--config", str(config), "--model.model", lms["gpt2"], "--trainer.default_root_dir", str(tmp_path)]
    given += ["--data.max_length", "48"]
    if name == "nearest_demonstrations":
        short_data(lms["gpt2"], tmp_path)
        given += ["--data", "TextClassificationData"]
        given += [f"--data.{split}={tmp_path / split}.jsonl" for split in ("train", "validation", "test")]
    if name == "prompted_classification":
        given += [
            "--model.templates",
            "{text} of {answer}",
            "--model.demonstrations",
            "1",
            "--model.multi_token",
            "true",
        ]
    if name == "prompted_generation":
        given += ["--model.demonstrations", "0"]
    command(monkeypatch, "test", *given, "--trainer.limit_test_batches", "2")
    score = "test_exact_match" if name == "prompted_generation" else "test_accuracy"
    assert score in capsys.readouterr().out
    command(monkeypatch, "predict", *given, "--trainer.limit_predict_batches", "2")
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    wanted = (
        {"row", "labels", "probabilities"}
        if name == "nearest_demonstrations"
        else {"row", "prompt", "scores", "answer"}
    )
    assert wanted <= rows[0].keys()
