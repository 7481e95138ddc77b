"""One talks to a tuned model in the terminal, and through a pipe."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft import CausalLM, ChatData, LoRA, PromptTuning, TuningError, save_delta
from lightning_peft.commands.chatting import Partner
from lightning_peft.commands.tools import run_tool
from lightning_peft.core import text_structure
from tests.modules import trainer
from tests.text import cache, valley

__all__ = ["cache", "valley"]
Valley = Callable[[str], str]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% else %} {% endif %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


class Typed(io.StringIO):
    """What is typed into a terminal, or comes through a pipe."""


@pytest.fixture
def said(valley: Valley, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., list[str]]:
    """Return what the model of a delta answers to lines through a pipe."""
    backbone = CausalLM(valley("gpt2")).backbone
    torch.manual_seed(1)
    LoRA(r=2).apply(backbone)
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3)
    save_delta(backbone, tmp_path / "delta.safetensors")

    def answers(lines: str, *arguments: str, template: str = TEMPLATE) -> list[str]:
        monkeypatch.setattr("sys.stdin", Typed(lines))
        run_tool("chat", [str(tmp_path / "delta.safetensors"), "--template", template, *arguments])
        return capsys.readouterr().out.splitlines()

    return answers


def partner(file: Path, template: str | None = TEMPLATE, **how: Any) -> Partner:
    return Partner(str(file), None, template, {"max_new_tokens": 4, "do_sample": False, **how})


def test_answers_follow_from_the_whole_conversation(
    said: Callable[..., list[str]], tmp_path: Path, capsys: Any
) -> None:
    first, second, again = said("the river\n\nthe valley\n/new\nthe river\n/exit\nthe end\n", "--max_new_tokens", "4")
    assert again == first
    other = partner(tmp_path / "delta.safetensors")
    turns = [{"role": "user", "content": "the river"}]
    assert other.answer(turns) == first.strip()
    turns += [{"role": "assistant", "content": first.strip()}, {"role": "user", "content": "the valley"}]
    assert other.answer(turns) == second.strip()
    assert capsys.readouterr().out.splitlines() == [first, second]
    text = other.renderer.text(turns, None, prompt=True)
    ids = other.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    written = other.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert other.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip() == second.strip()


def test_what_ends_a_turn_ends_an_answer(said: Callable[..., list[str]], tmp_path: Path) -> None:
    other = partner(tmp_path / "delta.safetensors")
    assert other.how["eos_token_id"] == [other.tokenizer.eos_token_id]
    other.model.generation_config.eos_token_id = None
    assert other._ends() == [other.tokenizer.eos_token_id]
    other.renderer.template = TEMPLATE.replace("{{ eos_token }}", ".")
    assert other._ends() == []


def test_the_system_speaks_first_and_sampling_draws(said: Callable[..., list[str]]) -> None:
    few = ("--max_new_tokens", "6")
    assert said("the river\n", *few) != said("the river\n", *few, "--system", "the valley")
    torch.manual_seed(1)
    drawn = said("the river\n", *few, "--temperature", "3.0")
    torch.manual_seed(2)
    assert said("the river\n", *few, "--temperature", "3.0") != drawn


def test_a_terminal_is_asked(
    said: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (piped,) = said("the river\n", "--max_new_tokens", "4")
    lines = iter(["the river", "", EOFError])

    def answer(prompt: str) -> str:
        assert prompt == "> "
        line = next(lines)
        if line is EOFError:
            raise EOFError
        return str(line)

    monkeypatch.setattr(Typed, "isatty", lambda stream: True)
    monkeypatch.setattr("sys.stdin", Typed())
    monkeypatch.setattr("builtins.input", answer)
    run_tool("chat", [str(tmp_path / "delta.safetensors"), "--template", TEMPLATE, "--max_new_tokens", "4"])
    assert capsys.readouterr().out.splitlines() == [piped]


def test_a_conversation_that_is_too_long_goes_on_anew(said: Callable[..., list[str]], capsys: Any) -> None:
    (answer,) = said("the river\n", "--max_new_tokens", "4")
    long = "river " * 300
    assert said(f"{long}\nthe river\n", "--max_new_tokens", "4") == [answer]
    with pytest.raises(TuningError, match=r"fails in the chat template \(no\): mend the row, or give another template"):
        said("hello\n", template="{{ raise_exception('no') }}")


def test_a_merged_model_says_the_same(said: Callable[..., list[str]], tmp_path: Path, capsys: Any) -> None:
    (answer,) = said("the river\n", "--max_new_tokens", "4")
    run_tool("merge", [str(tmp_path / "delta.safetensors"), str(tmp_path / "whole")])
    capsys.readouterr()
    sys.stdin.seek(0)
    run_tool("chat", [str(tmp_path / "whole"), "--template", TEMPLATE, "--max_new_tokens", "4"])
    assert capsys.readouterr().out.splitlines() == [answer]
    with pytest.raises(TuningError, match="is a whole model: leave out --backbone gpt2"):
        run_tool("chat", [str(tmp_path / "whole"), "--backbone", "gpt2"])
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    for file in ("adapter", "adapter/adapter_model.safetensors"):
        with pytest.raises(TuningError, match=r"an adapter of Hugging Face PEFT: .* lightning-peft import \S*adapter"):
            run_tool("chat", [str(tmp_path / file)])


def test_a_text_is_not_cut_where_no_limit_is_known(valley: Valley, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a rotary model whose tokenizer has no longest text."""
    task = CausalLM(valley("gpt2"), max_new_tokens=1)
    answered = task.predict(["the river"])
    monkeypatch.setattr(text_structure, "max_positions", lambda backbone: None)
    monkeypatch.setattr(task.tokenizer, "model_max_length", 10**30)
    assert task.predict(["the river"]) == answered


def test_what_is_no_chat_is_refused(said: Callable[..., list[str]], tmp_path: Path, valley: Valley) -> None:
    file = str(tmp_path / "delta.safetensors")
    with pytest.raises(TuningError, match="has no chat templates: give template="):
        run_tool("chat", [file])
    for name, value, rule in (("max_new_tokens", 0, "1 or more"), ("temperature", -1.0, "0 or more"),
                              ("top_p", 0.0, "above 0, to 1")):  # fmt: skip
        with pytest.raises(TuningError, match=f"{name}={value} is out of range: take {rule}"):
            run_tool("chat", [file, "--template", TEMPLATE, f"--{name}", str(value)])
    from lightning_peft import Seq2Seq

    other = Seq2Seq(valley("t5")).backbone
    LoRA(r=2).apply(other)
    save_delta(other, tmp_path / "t5.safetensors")
    with pytest.raises(TuningError, match="T5ForConditionalGeneration, which does not go on with a text: use predict"):
        run_tool("chat", [str(tmp_path / "t5.safetensors"), "--template", TEMPLATE])


@pytest.mark.slow
def test_a_checkpoint_brings_the_template_of_its_rows(
    valley: Valley, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    data = ChatData(tokenizer=valley("gpt2"), dataset="made://chats", template=TEMPLATE, batch_size=4, max_length=96)
    run = trainer(tmp_path, PromptTuning(num_virtual_tokens=2), max_steps=1, limit_val_batches=1)
    run.fit(CausalLM(valley("gpt2")), data)
    run.save_checkpoint(tmp_path / "run.ckpt")
    monkeypatch.setattr("sys.stdin", Typed("the river\n"))
    run_tool("chat", [str(tmp_path / "run.ckpt"), "--max_new_tokens", "3"])
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert partner(tmp_path / "run.ckpt", None).renderer.template == TEMPLATE
