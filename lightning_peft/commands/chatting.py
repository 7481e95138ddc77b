"""``chat``: talks to a tuned model in the terminal."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lightning_peft.core import structure, text_structure
from lightning_peft.core.delta_file import read_checkpoint
from lightning_peft.core.errors import TuningError
from lightning_peft.core.hub import load_model, load_tokenizer
from lightning_peft.core.storage import is_safetensors
from lightning_peft.core.structure import name_or_path
from lightning_peft.data.bad_rows import BadRowError
from lightning_peft.data.chat_turns import Message, Renderer, template_text
from lightning_peft.training.rebuild import from_delta

_DATA = "datamodule_hyper_parameters"
_TRIED = "snowman"


def chat(
    file: str,
    backbone: str | None = None,
    template: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> None:
    """Talk to a tuned model; /new begins another conversation, /exit or the end of the input ends it.

    Args:
        file: a delta, as safetensors or checkpoint, or the folder of a merged model.
        backbone: folder or hub id of the backbone; the one that the delta was trained on if left out.
        template: the chat template, or the path of its file; that of the training, or the tokenizer's own, if left out.
        system: what the system says before the conversation.
        max_new_tokens: where an answer is cut [tokens].
        temperature: of the sampling; 0 takes the likeliest token.
        top_p: draw from the likeliest tokens that make up this share, with a temperature above 0.
    """
    partner = Partner(file, backbone, template, _options(max_new_tokens, temperature, top_p))
    start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages = [*start]
    for line in _lines():
        if line == "/exit":
            return
        if line == "/new":
            messages = [*start]
            continue
        asked: list[Message] = [*messages, {"role": "user", "content": line}]
        try:
            messages = [*asked, {"role": "assistant", "content": partner.answer(asked)}]
        except KeyboardInterrupt:  # enough of this answer
            print()
        except TuningError as error:
            print(error, file=sys.stderr)


def _options(max_new_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
    """Return what ``generate`` is told of an answer.

    Raises:
        TuningError: a value is out of range.
    """
    for name, value, fits, rule in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "0 or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0, to 1"),
    ):
        if not fits:
            raise TuningError(f"{name}={value} is out of range: take {rule}.")
    drawn = {"temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    return {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0, **drawn}


class Partner:
    """A tuned model with its tokenizer and the template by which it reads a conversation."""

    def __init__(self, file: str, backbone: str | None, template: str | None, how: Mapping[str, Any]) -> None:
        self.model: Any = _opened(file, backbone)
        if structure.is_encoder_decoder(self.model) or not structure.generates(self.model):
            raise TuningError(
                f"{file} is of {type(self.model).__name__}, which does not go on with a text: use predict."
            )
        if torch.cuda.is_available():
            self.model.cuda()
        self.tokenizer = load_tokenizer(backbone or name_or_path(self.model), "save it beside the model")
        self.renderer = Renderer(self.tokenizer, template_text(template or _trained_by(file), self.tokenizer))
        ends = self._ends()
        filler = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else next(iter(ends), None)
        self.how = {**how, "eos_token_id": ends or None, "pad_token_id": filler}

    @torch.no_grad()
    def answer(self, messages: Sequence[Message]) -> str:
        """Print the answer to a conversation while it is written, and return it.

        Raises:
            TuningError: the template fails, or the conversation is longer than the model reads.
        """
        from transformers import TextStreamer

        text = self._rendered(messages, prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(self.model.device)
        limit = text_structure.max_positions(self.model)
        if limit is not None and ids.shape[1] >= limit:
            raise TuningError(
                f"the conversation has {ids.shape[1]} tokens, and the model reads {limit}: begin another one by /new."
            )
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        most = self.how["max_new_tokens"] if limit is None else min(self.how["max_new_tokens"], limit - ids.shape[1])
        options = {**self.how, "max_new_tokens": most, "streamer": streamer}
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()

    def _ends(self) -> list[int]:
        """Return the tokens that end an answer: the model's own, and what the template puts behind one."""
        own = self.model.generation_config.eos_token_id
        ends = [*own] if isinstance(own, list) else [] if own is None else [own]
        turns: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _TRIED}]
        behind = self._rendered(turns).rpartition(_TRIED)[2].strip()
        first = self.tokenizer(behind, add_special_tokens=False)["input_ids"][:1]
        return list(dict.fromkeys([*ends, *(token for token in first if token in self.tokenizer.all_special_ids)]))

    def _rendered(self, messages: Sequence[Message], prompt: bool = False) -> str:
        try:
            return self.renderer.text(messages, None, prompt=prompt)
        except BadRowError as error:
            raise TuningError(f"the conversation {error}") from None


def _opened(file: str, backbone: str | None) -> Any:
    """Return the model of a delta, or that of a folder, in eval mode."""
    if not _is_model(file):
        return from_delta(file, backbone)
    if backbone is not None:
        raise TuningError(f"{file} is a whole model: leave out --backbone {backbone}.")
    return load_model(AutoModelForCausalLM, file).eval()


def _is_model(file: str) -> bool:
    return (Path(file) / "config.json").is_file()


def _trained_by(file: str) -> str | None:
    """Return the template that the rows of a checkpoint were rendered by, if they had one of their own."""
    found = {} if _is_model(file) or is_safetensors(Path(file)) else read_checkpoint(file).get(_DATA, {})
    return found.get("template")


def _lines() -> Iterator[str]:
    """Yield what the user says, line by line, without what is empty."""
    asked = sys.stdin.isatty()
    while True:
        try:
            line = input("> ") if asked else sys.stdin.readline()
        except EOFError:
            return
        if not line and not asked:
            return
        if line.strip():
            yield line.strip()
