"""Wordings of a task in a YAML file: read without evaluating anything, and listed."""

from pathlib import Path

from lightning_peft.core import shipped
from lightning_peft.core.errors import TuningError
from lightning_peft.prompting.instructions import TEMPLATES, Instructions
from lightning_peft.prompting.template import Template
from lightning_peft.prompting.yaml_files import read_mapping

_ENDINGS = (".yaml", ".yml")


def read_instructions(path: str | Path, count: int | None = TEMPLATES) -> Instructions:
    """Return the wordings that a YAML file holds: ``task``, ``templates``, ``inverse`` and ``words``.

    Args:
        path: of the file.
        count: how many templates there must be; None: any number.

    Raises:
        TuningError: there is no such file, or it holds no instructions.
    """
    found = shipped.find(path)
    if found is None:
        raise TuningError(f"{path} is no file: give the path of a YAML file with templates.")
    parts = read_mapping(found, "task and templates")
    try:
        return Instructions.of(parts, count)
    except TuningError as error:
        raise TuningError(f"{found}: {error}") from None


def instructions_of(templates: str | list[str], count: int | None = None) -> Instructions:
    """Return the wordings that an argument gives: a template, a list of them, or the path of a YAML file.

    Raises:
        TuningError: one of them is no template.
    """
    if isinstance(templates, str) and templates.endswith(_ENDINGS):
        return read_instructions(templates, count)
    texts = [templates] if isinstance(templates, str) else list(templates)
    if not texts:
        raise TuningError("there is no template: give one or more, or the path of a YAML file.")
    named = tuple(Template(text, str(number)) for number, text in enumerate(texts, 1))
    return Instructions("", named if len(named) > 1 else (Template(texts[0]),), {})
