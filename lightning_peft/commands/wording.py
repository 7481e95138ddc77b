"""Says what the parser of a command line objects to in one sentence: the argument, its value, and what it takes."""

import difflib
import re
from collections.abc import Iterable

from lightning_peft.core.columns import OWNERS

_CALLED = {
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "NoneType": "null",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "Iterable": "a list",
    "dict": "a mapping",
}
_NO_CLASS = r"Expected a dot import path string: ([^\n]*)|Unexpected import path format: ([^\n]*)"
_UNKNOWN = (
    r"unrecognized arguments: [- ]*([\w.]+)|[Oo]ption '([^']+)' is not accepted|not accept option '([^']+)'"
    r"|[Kk]ey '([^']+)' is not expected"
)


ALIASES = {
    "rank": "r",
    "lora_r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "learning_rate": "lr",
    "epochs": "trainer.max_epochs",
    "num_epochs": "trainer.max_epochs",
    "num_train_epochs": "trainer.max_epochs",
    "gpus": "trainer.devices",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "per_device_train_batch_size": "batch_size",
    "max_seq_length": "max_length",
    "prompt_length": "num_virtual_tokens",
    "prefix_length": "num_virtual_tokens",
    "pretrained_model_name_or_path": "model",
    "model_name_or_path": "model",
}
"""What others call an argument -> its name here."""


def unknown_word(message: str) -> str:
    """Return the argument that the parser does not know; '' if it objects to something else."""
    found = re.search(_UNKNOWN, message)
    return next(part for part in found.groups() if part) if found else ""


def one_sentence(message: str, names: Iterable[str]) -> str:
    """Return what the parser says, in one sentence; ``names`` are those that a user may have meant."""
    keys = re.findall(r'(?:Parser key|Key|key) "([^"]+)"', message)
    given = re.findall(r"(?:Given|Got) value: (.*)", message)
    place = f"{keys[-1]}={_short(given[-1])}" if keys and given else keys[-1] if keys else "the command line"
    if word := unknown_word(message):
        near = _nearest(word, names)
        return f"the argument {_short(word)} is not accepted{near or ': --help shows those that are.'}"
    if found := re.search(_NO_CLASS, message):
        word = next((part for part in found.groups() if part), "")
        said = f"{keys[-1] if keys else 'class_path'}={_short(word)} is no class that is known by that name"
        return f"{said}: give its import path{_nearest(word, names) or '.'}"
    if found := re.search(r"Import path (?:\S+ )?does not correspond to a subclass of (\w+)", message):
        return f"{place} is no {found[1]}: give the name of one."
    if found := re.search(r"Problem with given class_path '([^']+)':\s*(No module[^\n]+)", message):
        return f"{_short(found[1])} cannot be imported ({found[2].strip(' .')}): give a class that is installed."
    if found := re.search(r"argument (?:-\w/)?([-\w.]+): expected ", message):
        return f"{found[1]} has no value: give one behind it."
    if found := re.search(r"argument (?:-\w/)?([-\w.]+): ([^\n]*)", message):
        return f"{found[1]} cannot be that ({found[2].rstrip('.')}): --help says what it takes."
    if found := re.search(r"arguments are required: ([^\n]*)", message):
        return f"the command lacks {found[1]}: --help says what it takes."
    if "null byte" in message:
        return f"{keys[-1] if keys else 'an argument'} has a null byte, which no name has: take it out."
    if kinds := _kinds(message):
        return f"{place} is of another type: give {' or '.join(kinds)}."
    if found := re.search(r'key "([\w.]+)":\s*Unable to load config', message):
        return f"{found[1]} is no mapping of arguments and no file of one: give {found[1]}.NAME VALUE."
    return _as_it_is(message)


def _kinds(message: str) -> list[str]:
    """Return what an argument takes, in words: literals, types, and names of classes."""
    listed = re.search(r"Subtypes: \[(.*)\]\n", message) or re.search(
        r"Expected an? (.*?)(?:\. Got value|\n|$)", message
    )
    classes = re.findall(r"Not a valid subclass of (\w+)", message)
    text = listed[1].replace("typing.", "") if listed else ""
    found = []
    for literal, name, generic in re.findall(r"Literal\[([^\]]*)\]|<class '([\w.]+)'>|\b([\w.]+)\[", text):
        if literal:
            found.append(f"one of {literal}")
        else:
            last = (name or generic).rpartition(".")[2]
            if last not in ("Literal", "Union", "Optional", "Annotated"):
                found.append(_CALLED.get(last, f"the name of a {last}"))
    found += [f"the name of a {name}" for name in classes]
    return list(dict.fromkeys(found))


def _nearest(word: str, names: Iterable[str]) -> str:
    names, last = list(names), word.rpartition(".")[2]
    if (alias := ALIASES.get(last.casefold())) is not None and (alias in names or "." in alias):
        return f". Did you mean {alias!r}?"
    if last in OWNERS:
        return f": rows with {last} are those of --data {OWNERS[last]}."
    for each in (word, last):
        close = [name for name in names if name.casefold() == each.casefold() or name.startswith(f"{each}_")]
        close = close or difflib.get_close_matches(each, names, n=1)
        if close and close[0] not in (word, last):
            return f". Did you mean {close[0]!r}?"
    return ""


def _short(value: str) -> str:
    value = value.strip()
    return repr(value if len(value) <= 60 else f"{value[:57]}...")


def _as_it_is(message: str) -> str:
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    said = " ".join(lines)[:400].rstrip(".")
    return f"{said}." if ": " in said else f"{said}: --help says what is taken."
