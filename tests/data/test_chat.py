"""What of a conversation is learned, by templates of ten kinds of models, and what is wrong with rows."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lightning_peft import CausalLM, ChatData, PrefixTuning, PromptTuning, TuningError
from tests.models import hf
from tests.valley import set_up

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>", "<|eot_id|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"]


def turns(before: str, after: str, begin: str = "", names: str = "m.role", text: str = "m.content") -> str:
    """Return a template that marks what is between ``before`` and the next turn in those of the assistant."""
    said = f"{{{{ {text} + '{after}' }}}}"
    return (
        f"{begin}{{% for m in messages %}}{{{{ '{before}' | replace('ROLE', {names}) }}}}"
        f"{{% if m.role == 'assistant' %}}{{% generation %}}{said}{{% endgeneration %}}"
        f"{{% else %}}{said}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{before}' | replace('ROLE', 'assistant') }}}}{{% endif %}}"
    )


SAID = "{% for m in messages %}{% if m.role == 'assistant' %}"
NEXT = "{% if add_generation_prompt %}"
MISTRAL = (
    "{{ bos_token }}" + SAID + "{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}"
    + SAID
    + "{{ '<start_of_turn>model\\n' }}{% generation %}{{ m.content | trim + '<end_of_turn>\\n' }}"
    "{% endgeneration %}{% else %}{{ '<start_of_turn>' + m.role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}"
    "{% endif %}{% endfor %}" + NEXT + "{{ '<start_of_turn>model\\n' }}{% endif %}"
)
VICUNA = (
    SAID + "{{ 'ASSISTANT:' }}{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ m.role | upper + ': ' + m.content + ' ' }}{% endif %}{% endfor %}"
    + NEXT
    + "{{ 'ASSISTANT:' }}{% endif %}"
)
TEMPLATES = {
    "chatml": turns("<|im_start|>ROLE\\n", "<|im_end|>\\n"),
    "llama3": turns(
        "<|start_header_id|>ROLE<|end_header_id|>\\n\\n", "<|eot_id|>", "{{ bos_token }}", text="m.content | trim"
    ),
    "zephyr": turns("<|ROLE|>\\n", "</s>\\n"),
    "phi": turns("<|ROLE|>\\n", "<|end|>\\n"),
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "vicuna": VICUNA,
    "alpaca": turns("### ROLE:\\n", "\\n\\n"),
    "plain": turns("ROLE: ", "\\n"),
    "header": turns("[ROLE] ", "</s>", "{{ bos_token }}{{ '[tools] ' + (tools | tojson) if tools else '' }}"),
}
UNMARKED = re.compile(r"\{% (?:end)?generation %\}")
ROWS = [
    [("user", "hello there"), ("assistant", "hello you")],
    [("user", "a bird ?"), ("assistant", "a tree"), ("user", "two\nlines  here"), ("assistant", "  no, three  ")],
    [("system", "be short"), ("user", "who sings"), ("assistant", "the bird"), ("user", "thank you")],
]


def conversation(said: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in said]


def save_tokenizer(path: Path) -> str:
    """Save a byte-level tokenizer with the special tokens of many chat models, and return the folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator([content for row in ROWS for _, content in row], trainer)
    ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=256, **ends).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("chat"))


def write(path: Path, rows: list[Any], column: str = "messages") -> str:
    file = path / "rows.jsonl"
    file.write_text("".join(json.dumps(row if isinstance(row, dict) else {column: row}) + "\n" for row in rows))
    return str(file)


def chat(folder: str, file: str, **kwargs: Any) -> ChatData:
    defaults = {"template": TEMPLATES["chatml"], "validation_share": 0, "test_share": 0, "bucket": False}
    return ChatData(tokenizer=folder, train=file, **defaults | {"validation": file, "predict": file} | kwargs)


def encoded(data: ChatData, split: str = "validation") -> list[dict[str, Any]]:
    set_up(data, *(["predict"] if split == "predict" else ["fit"]))
    loader = data.predict_dataloader() if split == "predict" else data.val_dataloader()
    (batch,) = loader
    names = [name for name in ("input_ids", "labels") if name in batch]
    lengths = batch["attention_mask"].sum(1).tolist()
    side = slice if split != "predict" else (lambda n: slice(-n, None))
    return [{name: batch[name][i][side(n)].tolist() for name in names} for i, n in enumerate(lengths)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_are_those_of_transformers_with_marks_and_without(name: str, folder: str, tmp_path: Path) -> None:
    """TRL asks transformers for the mask of a template with marks; without them the turns are found by their prefix."""
    tokenizer, template = AutoTokenizer.from_pretrained(folder), TEMPLATES[name]
    file = write(tmp_path, [conversation(row) for row in ROWS])
    for used in (template, UNMARKED.sub("", template)):
        rows = encoded(chat(folder, file, template=used))
        for row, said in zip(rows, ROWS, strict=True):
            whole = tokenizer.apply_chat_template(
                conversation(said), chat_template=template, return_assistant_tokens_mask=True, return_dict=True
            )
            mask = whole["assistant_masks"]
            assert row["input_ids"] == whole["input_ids"]
            assert row["labels"] == [i if m else -100 for i, m in zip(whole["input_ids"], mask, strict=True)]
            learned = tokenizer.decode([i for i in row["labels"] if i != -100])
            assert [content.strip() in learned for role, content in said if role == "assistant"].count(False) == 0
            assert not any(content.strip() in learned for role, content in said if role != "assistant")


@pytest.mark.parametrize("marked", [True, False])
def test_the_last_turn_or_all(marked: bool, folder: str, tmp_path: Path) -> None:
    template = TEMPLATES["chatml"] if marked else UNMARKED.sub("", TEMPLATES["chatml"])
    data = chat(folder, write(tmp_path, [conversation(ROWS[1])]), template=template, train_on="last")
    (row,) = encoded(data)
    assert data.tokenizer.decode([i for i in row["labels"] if i != -100]) == "  no, three  <|im_end|>\n"
    (row,) = encoded(chat(folder, write(tmp_path, [conversation(ROWS[1])]), template=template, train_on="all"))
    assert row["labels"] == row["input_ids"]


def test_sharegpt_tools_and_prediction(folder: str, tmp_path: Path) -> None:
    shared = [{"from": "human", "value": "hello there"}, {"from": "gpt", "value": "hello you"}]
    plain = encoded(chat(folder, write(tmp_path, [conversation(ROWS[0])])))
    assert encoded(chat(folder, write(tmp_path, [shared], "conversations"), messages="conversations")) == plain
    tools = [{"type": "function", "function": {"name": "look"}}]
    rows = [{"messages": conversation(ROWS[0]), "tools": json.dumps(tools)}]
    data = chat(folder, write(tmp_path, rows), template=TEMPLATES["header"])
    (row,) = encoded(data)
    assert "look" in data.tokenizer.decode(row["input_ids"])
    data = chat(folder, write(tmp_path, [conversation(row) for row in ROWS]))
    prompts = [data.tokenizer.decode(row["input_ids"]) for row in encoded(data, "predict")]
    assert all(prompt.endswith("<|im_end|>\n<|im_start|>assistant\n") for prompt in prompts)
    assert "a tree" in prompts[1]
    assert "no, three" not in prompts[1]


def test_packed_rows_are_those_alone(folder: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "model")
    task = CausalLM(str(tmp_path / "model")).eval()
    file = write(tmp_path, [conversation(row) for row in ROWS] * 2)
    batches, counts = [], []
    for packing in (True, False):
        data = chat(folder, file, packing=packing, max_length=150)
        set_up(data)
        for loader in (data.train_dataloader(), data.val_dataloader()):
            (batch,) = loader
            batches.append(batch)
            counts.append(int(task.counted(batch)))
            assert ("position_ids" in batch) == packing
            assert len(batch["input_ids"]) < 6 if packing else len(batch["input_ids"]) == 6
    assert counts == [counts[0]] * 4
    for method in (None, PromptTuning(num_virtual_tokens=3, init="random_uniform"), PrefixTuning(num_virtual_tokens=3)):
        if method is not None:
            method.apply(task.backbone)
        prepared = [dict(batch if method is None else method.prepare(batch)) for batch in batches]
        losses, trained = [task.loss(batch) for batch in prepared], [p for p in task.parameters() if p.requires_grad]
        assert [loss.item() for loss in losses] == pytest.approx([losses[0].item()] * 4, rel=1e-5)
        for packed, alone in zip(*(torch.autograd.grad(losses[i], trained) for i in (0, 2)), strict=True):
            assert (packed - alone).abs().max() <= 1e-6 * max(1, alone.abs().max())
        if method is not None:
            method.remove(task.backbone)


USER, ANSWER = ("user", "hello there"), ("assistant", "hello you")
CHANGING = "{% for m in messages %}{{ m.content if loop.last else m.role }}{% endfor %}"
MISTAKES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no turn": (conversation([USER]), {}, "has no turn of the assistant: leave the row out"),
    "empty": (conversation([USER, ("assistant", " ")]), {}, r"has no content in message 1 \(assistant\): give a text"),
    "role": (conversation([("bot", "hello"), ANSWER]), {}, "has the role 'bot' in message 0: take one of system,"),
    "nothing": ([], {}, r"has '\[\]' for messages: give a list of role and content"),
    "template": (
        conversation([USER, ANSWER]),
        {"template": "{{ raise_exception('roles must alternate') }}"},
        r"fails in the chat template \(roles must alternate\): mend the row",
    ),
    "told apart": (
        conversation([USER, ANSWER, USER, ANSWER]),
        {"template": CHANGING},
        "has a turn of the assistant, message 1, that the template writes in another way when .*: take train_on=last",
    ),
    "marks": (
        conversation([USER, ANSWER]),
        {"template": "{% generation %}{% endgeneration %}{{ 'x' }}"},
        "has no token of the assistant among its first 128: leave the row out",
    ),
    "fewer marks": (
        conversation([USER, ANSWER, USER, ANSWER]),
        {"template": "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}x{% endgeneration %}"},
        "has 2 turns of the assistant, of which the template marks 1: put generation and endgeneration around each",
    ),
    "long": (
        conversation([USER, ANSWER]),
        {"max_length": 10},
        r"has no token of the assistant among its first 10: its turn begins at token \d+, so raise",
    ),
    "part of a token": (
        conversation([("user", "he"), ("assistant", "llo")]),
        {"template": "{% for m in messages %}{{ m.content }}{% endfor %}"},
        "has the token 'hello' in which the assistant's turn begins: let the template put a blank",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_bad_rows_are_named_by_number(name: str, folder: str, tmp_path: Path) -> None:
    row, arguments, message = MISTAKES[name]
    file = write(tmp_path, [{"messages": row}])
    with pytest.raises(TuningError, match=f"^row 1 of the train split {message}"):
        set_up(chat(folder, file, **arguments))


def test_bad_rows_are_left_out_and_counted(folder: str, tmp_path: Path) -> None:
    good, bad = conversation([USER, ANSWER]), conversation([USER])
    file = write(tmp_path, [good, bad, good, bad])
    with pytest.raises(TuningError, match=r"^row 2 of the train split has no turn of the assistant"):
        set_up(chat(folder, file))
    data = chat(folder, file, skip_bad_rows=True)
    with pytest.warns(
        UserWarning, match="2 of 4 rows of the (train|validation) split are left out, the first: row 2 of"
    ):
        assert len(encoded(data)) == 2
    with pytest.raises(TuningError, match="row 1 of the train split has no turn"):
        set_up(chat(folder, write(tmp_path, [bad]), skip_bad_rows=True))


def test_templates_that_are_none(folder: str, tmp_path: Path) -> None:
    file = write(tmp_path, [conversation(ROWS[0])])
    with pytest.raises(TuningError, match="has no chat templates: give template="):
        set_up(chat(folder, file, template=None))
    with pytest.raises(TuningError, match=r"template='none\.jinja' is no file and no template"):
        set_up(chat(folder, file, template="none.jinja"))
    (tmp_path / "own.jinja").write_text(TEMPLATES["chatml"])
    assert encoded(chat(folder, file, template=str(tmp_path / "own.jinja"))) == encoded(chat(folder, file))
