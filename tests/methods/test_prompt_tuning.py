"""PromptTuning: a soft prompt is words. Made of the embeddings of real tokens it equals those tokens in the input."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from lightning_peft import PromptTuning, TuningError, collect, merge
from lightning_peft.core.graft import grafts
from lightning_peft.prompts.virtual_tokens import PromptRows
from tests.contract import MethodContract, assert_near, output, snapshot
from tests.models import LABELS, MINILM, POSITIONS, TEXT, VOCABULARY, batch, meta, tiny
from tests.modules import Tuned, loader, trainer

WORDS = [20, 31, 20, 57]


class TestPromptTuning(MethodContract):
    method = PromptTuning(num_virtual_tokens=4, init="random_uniform")
    backbones = TEXT
    on_families = (("prompt_tuning", PromptTuning(num_virtual_tokens=2, init="random_uniform")),)
    traces_backward = True
    identity_at_start = False

    def count(self, kind: str) -> int:
        """P d."""
        return 4 * 32


@pytest.mark.parametrize(
    ("config", "length", "count"),
    [
        (hf.T5Config(d_model=4096, num_layers=24, num_heads=64, d_kv=64, d_ff=10240, vocab_size=32128), 100, 409_600),
        (hf.T5Config(d_model=4096, num_layers=24, num_heads=64, d_kv=64, d_ff=10240, vocab_size=32128), 1, 4_096),
        (hf.T5Config(d_model=768, num_layers=12, num_heads=12, d_ff=2048, vocab_size=32128), 100, 76_800),
        (hf.T5Config(d_model=512, num_layers=8, num_heads=6, d_ff=1024, vocab_size=32128), 100, 51_200),
        (MINILM, 20, 7_680),
    ],
    ids=["T5-XXL P=100", "T5-XXL P=1", "T5-base", "T5-small", "MiniLM P=20"],
)
def test_counts_of_the_paper(config: hf.PreTrainedConfig, length: int, count: int) -> None:
    model = meta(config)
    PromptTuning(num_virtual_tokens=length).apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


# A prompt of real tokens equals those tokens.


def prompted(model: nn.Module, words: list[int] = WORDS) -> PromptTuning:
    """Apply a prompt whose rows are the embeddings of real words."""
    method = PromptTuning(num_virtual_tokens=len(words), init="random_uniform")
    method.apply(model)
    with torch.no_grad():
        method.rows(model).copy_(model.get_input_embeddings().weight[words])
    return method


def written(inputs: dict[str, Tensor], kind: str, words: list[int] = WORDS) -> dict[str, Tensor]:
    """Put the words into the input by hand: after the padding on the left, and after [CLS]."""
    rows: dict[str, list[Tensor]] = {"input_ids": [], "attention_mask": []}
    per_token = inputs.get("labels") is not None and kind in ("gpt2", "llama", "tokens")
    if per_token:
        rows["labels"] = []
    for i, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        at = mask.tolist().index(1) + (kind not in ("gpt2", "llama", "t5"))
        columns = {"input_ids": (ids, torch.tensor(words)), "attention_mask": (mask, torch.ones(len(words)).long())}
        if per_token:
            columns["labels"] = (inputs["labels"][i], torch.full((len(words),), -100))
        for name, (row, put) in columns.items():
            rows[name].append(torch.cat([row[:at], put, row[at:]]))
    return inputs | {name: torch.stack(columns) for name, columns in rows.items()}


CAUSAL = ("gpt2", "llama")


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("kind", ["bert", "distilbert", "t5"])
def test_a_prompt_of_real_tokens_is_those_tokens(kind: str, padding: str) -> None:
    inputs, plain, model = batch(kind, padded=False), tiny(kind).requires_grad_(False), tiny(kind)
    if padding != "none":
        inputs["attention_mask"][1::2, -3:] = 0
        if padding == "left":
            inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    method = prompted(model)
    with torch.no_grad():
        ours, theirs = model(**method.prepare(inputs)), plain(**written(inputs, kind))
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_before_a_causal_text_too(kind: str, padding: str) -> None:
    """The prompt itself has no outputs; the first token of a text is in no loss, as without a prompt."""
    inputs, plain, model = batch(kind, padded=False), tiny(kind).requires_grad_(False), tiny(kind)
    inputs["labels"][:, 0] = -100
    if padding == "right":
        inputs["attention_mask"][1::2, -3:] = 0
        inputs["labels"][1::2, -3:] = -100
    method = prompted(model)
    with torch.no_grad():
        ours, theirs = model(**method.prepare(inputs)), plain(**written(inputs, kind))
    real = inputs["attention_mask"].bool()
    assert_near({"": theirs.logits[:, len(WORDS) :][real]}, {"": ours.logits[real]}, 1e-5)
    assert_near({"": theirs.loss}, {"": ours.loss}, 1e-5)


@pytest.mark.parametrize("kind", CAUSAL)
def test_padding_on_the_left_of_a_causal_text(kind: str) -> None:
    model, inputs = tiny(kind), batch(kind, padded=False)
    prompted(model)
    ids, positions = inputs["input_ids"], torch.arange(10).expand(4, -1)
    padded = torch.cat((torch.zeros(4, 3, dtype=torch.long), ids), 1)
    mask = torch.cat((torch.zeros(4, 3, dtype=torch.long), torch.ones_like(ids)), 1)
    positions = torch.cat((torch.zeros(4, 3, dtype=torch.long), positions), 1)
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        both = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    assert_near({"": alone}, {"": both}, 1e-5)


@pytest.mark.parametrize("kind", TEXT)
def test_the_text_init_is_those_tokens(kind: str, tokenizer: Path) -> None:
    plain, model, inputs = tiny(kind).requires_grad_(False), tiny(kind), batch(kind)
    method = PromptTuning(num_virtual_tokens=4, init="text", text="Good film music", tokenizer=str(tokenizer))
    method.apply(model)
    ids = hf.AutoTokenizer.from_pretrained(tokenizer).convert_tokens_to_ids(["good", "film", "music", "good"])
    with torch.no_grad():
        theirs = plain(**written(inputs, kind, ids)).logits[:, 4 if kind in CAUSAL else 0 :]
    assert_near({"": theirs}, {"": output(model, kind, method)}, 1e-5)


@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"num_beams": 3}], ids=["greedy", "uncached", "beams"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_generate_gives_the_same_tokens(kind: str, how: dict[str, Any]) -> None:
    inputs = {name: value for name, value in batch(kind).items() if name != "labels"}
    plain, model = tiny(kind).requires_grad_(False), tiny(kind)
    method = prompted(model)
    settings = {"max_new_tokens": 8, "do_sample": False} | how
    theirs = plain.generate(**written(inputs, kind), **settings)
    ours = model.generate(**method.prepare(inputs), **settings)
    without = plain.generate(**inputs, **settings)
    if kind != "t5":
        theirs, ours = theirs[:, 14:], ours[:, 10:]
        without = without[:, 10:]
    assert torch.equal(ours, theirs)
    assert ours.shape != without.shape or not torch.equal(ours, without)


def test_generate_from_padding_on_the_left() -> None:
    model, ids = tiny("gpt2"), batch("gpt2")["input_ids"]
    prompted(model)
    padded = torch.cat((torch.zeros(4, 3, dtype=torch.long), ids), 1)
    mask = (torch.arange(13) >= 3).long().expand(4, -1)
    alone, both = (
        model.generate(i, attention_mask=m, max_new_tokens=6, do_sample=False)
        for i, m in ((ids, torch.ones_like(ids)), (padded, mask))
    )
    assert torch.equal(alone, both[:, 3:])


def test_a_cache_of_fixed_size_has_no_room() -> None:
    model = tiny("llama")
    prompted(model)
    with pytest.raises(TuningError, match="fixed size"):
        model.generate(batch("llama")["input_ids"], max_new_tokens=3, cache_implementation="static")


def test_the_shared_prompt_is_computed_once_a_batch() -> None:
    model, sizes = tiny("gpt2"), []
    prompted(model)
    model.transformer.h[0].register_forward_hook(lambda module, args, out: sizes.append(args[0].shape[:2]))
    model(**batch("gpt2"))
    assert sizes == [(1, 4), (4, 10)]


def test_hidden_states_are_those_of_the_text() -> None:
    model = tiny("gpt2").train()
    prompted(model)
    plain = model(**batch("gpt2"), output_hidden_states=True).hidden_states
    model.activation_checkpointing_enable({"use_reentrant": False})
    again = model(**batch("gpt2"), output_hidden_states=True).hidden_states
    assert [h.shape for h in again] == [(4, 10, 32)] * 3
    for ours, theirs in zip(plain, again, strict=True):
        assert_near({"": ours}, {"": theirs}, 1e-5)


@pytest.mark.parametrize("length", [6, 10, 14])
def test_the_targets_of_an_encoder_decoder_have_no_prompt(length: int) -> None:
    """Also where they are as long as the input, or as the input with the prompt."""
    inputs, plain, model = batch("t5"), tiny("t5").requires_grad_(False), tiny("t5")
    inputs["labels"] = torch.randint(5, VOCABULARY, (4, length))
    method = prompted(model)
    with torch.no_grad():
        ours, theirs = model(**method.prepare(inputs)), plain(**written(inputs, "t5"))
    assert ours.logits.shape == (4, length, VOCABULARY)
    assert torch.equal(ours.logits, theirs.logits)


# Heads other than a pooled [CLS].


def test_token_labels_stay_with_their_tokens() -> None:
    config = tiny("bert").config
    model = hf.BertForTokenClassification(config).eval()
    plain = hf.BertForTokenClassification(config).eval().requires_grad_(False)
    plain.load_state_dict(model.state_dict())
    inputs = batch("bert") | {"labels": torch.randint(0, LABELS, (4, 10))}
    method = prompted(model)
    with torch.no_grad():
        ours, theirs = model(**method.prepare(inputs)), plain(**written(inputs, "tokens"))
    real = torch.cat([ours.logits[:, :1], ours.logits[:, 5:]], dim=1)
    assert torch.equal(ours.loss, theirs.loss)
    assert_near({"": F.cross_entropy(real.flatten(0, 1), inputs["labels"].flatten())}, {"": ours.loss}, 1e-6)


def test_answer_spans_move_with_the_text() -> None:
    config = hf.BertConfig.from_dict(tiny("bert").config.to_dict() | {"num_labels": 2})
    model = hf.BertForQuestionAnswering(config).eval()
    plain = hf.BertForQuestionAnswering(config).eval().requires_grad_(False)
    plain.load_state_dict(model.state_dict())
    inputs = {name: value for name, value in batch("bert").items() if name != "labels"}
    spans = {"start_positions": torch.tensor([0, 3, 1, 7]), "end_positions": torch.tensor([0, 5, 1, 9])}
    method = prompted(model)
    prepared = method.prepare(inputs | spans)
    assert prepared["start_positions"].tolist() == [0, 7, 5, 11]  # [CLS], "no answer", stays where it is
    assert prepared["end_positions"].tolist() == [0, 9, 5, 13]
    moved = {name: prepared[name] for name in spans}
    with torch.no_grad():
        assert torch.equal(model(**prepared).loss, plain(**written(inputs, "bert"), **moved).loss)


def test_a_prepared_batch_is_not_prepared_again() -> None:
    method = prompted(tiny("bert"))
    once = method.prepare(batch("bert"))
    assert method.prepare(once) is once


# Initial values.


def test_random_rows_are_symmetric() -> None:
    model = tiny("bert")
    method = PromptTuning(num_virtual_tokens=60, init="random_uniform")
    method.apply(model)
    rows = method.rows(model)
    assert rows.min() < -0.4
    assert rows.max() > 0.4
    assert rows.abs().max() <= 0.5
    assert abs(rows.mean()) < 0.02


@pytest.mark.parametrize(("count", "top"), [(20, 5000), (5, 5)])
def test_sampled_rows_are_distinct_frequent_words(count: int, top: int, tokenizer: Path) -> None:
    model = tiny("bert")
    method = PromptTuning(num_virtual_tokens=count, top_words=top, tokenizer=str(tokenizer))
    method.apply(model)
    table = model.get_input_embeddings().weight
    same = (method.rows(model).unsqueeze(1) == table.unsqueeze(0)).all(-1)
    ids = same.float().argmax(1).tolist()
    assert same.any(1).all()
    assert len(set(ids)) == count
    assert min(ids) >= 12, "specials, unused tokens and single letters are no words"
    assert max(ids) < 12 + top


def test_more_rows_than_words_repeat_words(tokenizer: Path) -> None:
    model = tiny("bert")
    method = PromptTuning(num_virtual_tokens=9, top_words=5, tokenizer=str(tokenizer))
    method.apply(model)
    assert method.rows(model).unique(dim=0).shape[0] <= 5


def test_a_seed_draws_the_same_rows(tokenizer: Path) -> None:
    def rows(seed: int) -> Tensor:
        model, method = tiny("bert"), PromptTuning(num_virtual_tokens=9, tokenizer=str(tokenizer), seed=seed)
        method.apply(model)
        return method.rows(model).clone()

    assert torch.equal(rows(1), rows(1))
    assert not torch.equal(rows(1), rows(2))


@pytest.mark.parametrize("given", [True, False])
def test_class_labels_are_the_mean_of_their_tokens(given: bool, tokenizer: Path) -> None:
    model, labels = tiny("bert"), ["good", "bad film", "time and water"]
    if not given:
        model.config.id2label = dict(enumerate(labels))
    method = PromptTuning(
        num_virtual_tokens=6, init="class_labels", class_labels=labels if given else None, tokenizer=str(tokenizer)
    )
    method.apply(model)
    table = model.get_input_embeddings().weight
    words = hf.AutoTokenizer.from_pretrained(tokenizer)
    for row, label in zip(method.rows(model), labels, strict=False):
        ids = words(label, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(label.split())
        assert_near({"": table[ids].mean(0)}, {"": row}, 1e-6)
    rest = method.rows(model)[3:]
    assert (rest.unsqueeze(1) == table.unsqueeze(0)).all(-1).any(1).all(), "the other rows are words"


def test_a_scaled_table_gives_its_scaled_words(tokenizer: Path) -> None:
    """M2M100 and its like multiply embeddings by sqrt(d) inside the table: a row must be what the table gives."""
    config = hf.M2M100Config(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=POSITIONS,
    )
    model = hf.M2M100ForConditionalGeneration(config).eval()
    method = PromptTuning(num_virtual_tokens=1, init="text", text="film", tokenizer=str(tokenizer))
    method.apply(model)
    word = hf.AutoTokenizer.from_pretrained(tokenizer).convert_tokens_to_ids("film")
    with torch.no_grad():
        given = model.get_input_embeddings()(torch.tensor([[word, -1]]))
    assert torch.equal(given[0, 0], given[0, 1])


def test_an_untrained_word_is_nearest_to_itself(tokenizer: Path) -> None:
    model = tiny("bert")
    method = PromptTuning(num_virtual_tokens=2, init="text", text="river tree", tokenizer=str(tokenizer))
    method.apply(model)
    nearest = method.nearest_words(model, k=3)
    assert [row[0][0] for row in nearest] == ["river", "tree"]
    assert [row[0][1] for row in nearest] == pytest.approx([1, 1])
    assert all(row[0][1] > row[1][1] >= row[2][1] for row in nearest)
    for k in (0, VOCABULARY + 1):
        with pytest.raises(TuningError, match=f"k={k} is out of range: the model has {VOCABULARY} words"):
            method.nearest_words(model, k=k)


# What does not fit.


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("bert", {"num_virtual_tokens": 0}, "num_virtual_tokens=0 is no prompt"),
        ("bert", {"num_virtual_tokens": POSITIONS}, "num_virtual_tokens=64 leaves no room in the 64 positions"),
        ("gpt2", {"num_virtual_tokens": POSITIONS + 1}, "leaves no room in the 64 positions"),
        ("bert", {"init": "text"}, "init='text' needs the words of the prompt: give text="),
        ("bert", {"init": "text", "text": " "}, "text=' ' has no tokens"),
        ("bert", {"init": "class_labels"}, "init='class_labels' needs the names of the classes"),
        (
            "bert",
            {"init": "class_labels", "class_labels": ["good", "bad", "film"], "num_virtual_tokens": 2},
            "3 class labels do not fit a prompt of 2 virtual tokens: set num_virtual_tokens to 3",
        ),
        ("bert", {"init": "class_labels", "class_labels": ["good", ""]}, "the class label '' has no tokens"),
        ("bert", {"init": "sampled_words"}, "init='sampled_words'"),
        ("bert", {"tokenizer": "/no/such/folder"}, "no tokenizer at '/no/such/folder'"),
        ("bert", {"tokenizer": None}, "init='sampled_vocab' needs the words of the model: give tokenizer="),
        ("bert", {"top_words": 0}, "top_words=0"),
        ("vit", {}, "ViTForImageClassification has no table of word embeddings"),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(
    kind: str, arguments: dict, message: str, tokenizer: Path
) -> None:
    model = tiny(kind)
    before = snapshot(model, kind)
    with pytest.raises(TuningError, match=message):
        PromptTuning(**{"tokenizer": str(tokenizer)} | arguments).apply(model)
    after = snapshot(model, kind)
    assert after["requires_grad"] == before["requires_grad"]
    assert after["modules"] == before["modules"]


def test_a_text_too_long_for_the_positions_is_refused() -> None:
    method = prompted(tiny("bert"))
    method.prepare(batch("bert", length=POSITIONS - 4))
    with pytest.raises(TuningError, match=r"61 tokens and a prompt of 4 do not fit the 64 .* set max_length to 60"):
        method.prepare(batch("bert", length=POSITIONS - 3))
    method = prompted(tiny("llama"))
    method.prepare(batch("llama", length=2 * POSITIONS))


def test_a_batch_that_shows_no_text_is_left_to_the_model() -> None:
    method = prompted(tiny("bert"))
    for other in ((torch.ones(2, 3),), {"pixel_values": torch.ones(2, 3)}, {"inputs_embeds": torch.zeros(2, 3, 32)}):
        assert method.prepare(other) is other


def test_embeddings_without_a_prompt_are_refused() -> None:
    model = tiny("bert")
    method = prompted(model)
    for _ in range(2):
        with pytest.raises(TuningError, match="is given embeddings of a text without its prompt"):
            model(inputs_embeds=torch.zeros(2, 3, 32))
        model(**method.prepare(batch("bert")))


def test_a_prompt_is_not_merged() -> None:
    model = tiny("gpt2")
    method = prompted(model)
    before = output(model, "gpt2", method)
    with pytest.raises(TuningError, match="cannot be merged"):
        merge(model)
    assert torch.equal(output(model, "gpt2", method), before)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_tied_tables_share_one_prompt(kind: str) -> None:
    model = tiny(kind)
    prompted(model)
    assert len(collect(model)) == 1
    prompts = [place.graft for place in grafts(model) if isinstance(place.graft, PromptRows)]
    assert len(prompts) == {"gpt2": 1, "t5": 3}[kind]
    assert len({id(prompt.weight) for prompt in prompts}) == 1


def test_the_head_gives_logits_for_the_text_alone() -> None:
    model = tiny("gpt2")
    method = prompted(model)
    assert model(**method.prepare(batch("gpt2"))).logits.shape == (4, 10, VOCABULARY)
    with pytest.raises(TuningError, match="has virtual tokens, but PromptTuning puts its prompt before the text"):
        method.prepare({"input_ids": torch.tensor([[-1, 5]])})


# Several prompts on one frozen model.


@pytest.mark.parametrize("kind", TEXT)
def test_a_batch_of_mixed_tasks_is_a_run_for_each(kind: str) -> None:
    model, inputs = tiny(kind), batch(kind)
    method = PromptTuning(num_virtual_tokens=3, num_prompts=2, init="random_uniform")
    method.apply(model)
    prompts = method.rows(model).detach().view(2, 3, -1)
    tasks = torch.tensor([1, 0, 0, 1])
    mixed = method.prepare(inputs | {"task_ids": tasks})
    logits = model(**{name: mixed[name] for name in inputs}).logits
    for task in (0, 1):
        alone, single = tiny(kind), PromptTuning(num_virtual_tokens=3, init="random_uniform")
        single.apply(alone)
        with torch.no_grad():
            single.rows(alone).copy_(prompts[task])
            expected = alone(**single.prepare(inputs)).logits[tasks == task]
        found = logits[tasks == task]
        assert_near({"": expected}, {"": found[:, -10:] if kind in CAUSAL else found}, 1e-5)


def test_each_task_trains_its_own_prompt() -> None:
    model, inputs = tiny("bert"), batch("bert")
    method = PromptTuning(num_virtual_tokens=3, num_prompts=3, init="random_uniform")
    method.apply(model)
    prepared = method.prepare(inputs | {"task_ids": torch.tensor([1, 1, 2, 1])})
    model(**{name: prepared[name] for name in inputs}).loss.backward()
    grad = method.rows(model).grad.view(3, 3, -1)
    assert [bool(g.any()) for g in grad] == [False, True, True]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (None, r"let it hold task_ids, \[B\]"),
        ([0, 1, 2, 0], "task id 2 is out of range: there are prompts 0 to 1"),
        ([0, 1, -1, 0], "task id -1 is out of range"),
    ],
)
def test_tasks_without_a_prompt_are_refused(tasks: list[int] | None, message: str) -> None:
    method = PromptTuning(num_virtual_tokens=3, num_prompts=2, init="random_uniform")
    method.apply(tiny("bert"))
    more = {} if tasks is None else {"task_ids": torch.tensor(tasks)}
    with pytest.raises(TuningError, match=message):
        method.prepare(batch("bert") | more)


def test_a_second_trainer_with_a_callback_of_its_own(tmp_path: Path) -> None:
    """The module is tuned already, so the new callback is not applied: it must prepare batches all the same."""
    arguments = {"num_virtual_tokens": 4, "init": "random_uniform"}
    module, first = Tuned("bert"), trainer(tmp_path, PromptTuning(**arguments))
    first.fit(module, loader("bert"), loader("bert"))
    second = trainer(tmp_path, PromptTuning(**arguments))
    assert second.validate(module, loader("bert"), verbose=False) == first.validate(
        module, loader("bert"), verbose=False
    )
