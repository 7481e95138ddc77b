"""``--config``: files of arguments that add up, by path or by the short name of one that comes with the package."""

import difflib
import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace  # type: ignore[attr-defined]  # it is documented
from rich.console import Console
from rich.table import Table

from lightning_peft.core import shipped
from lightning_peft.core.errors import TuningError

_NAME = re.compile(r"[\w./-]+")


class ConfigFile(ActionConfigFile):
    """Takes short names, and lets the data of a file begin clean.

    A class that a later file gives with the same name would keep the arguments of the earlier one that it does not
    mention: rows of one's own would be looked for in a data set of the hub, or read with the separator of the demo.
    """

    @staticmethod
    def apply_config(parser: ArgumentParser, cfg: Namespace, dest: str, value: Any) -> None:
        """Merge a file into what was given before it."""
        value = named(value) if isinstance(value, str) else value
        if _names_data(value):
            cfg.pop("data", None)
        ActionConfigFile.apply_config(parser, cfg, dest, value)


def named(value: str) -> str:
    """Return the path of a file, or of the configuration that comes with the package by that name.

    Raises:
        TuningError: there is neither.
    """
    path = shipped.find(value) if _NAME.fullmatch(value) else None
    if path is not None:
        return str(path)
    if _NAME.fullmatch(value) and not Path(value).exists():
        raise TuningError(
            f"--config {value} is no file{_nearest(value)}: give a path, or a name that lightning-peft configs lists."
        )
    return value


def configs(action: str = "list", name: str | None = None, to: str = ".") -> None:
    """List the configurations that come with the package; show one, or copy one to edit it.

    Args:
        action: list, show or copy.
        name: of a configuration, such as lora or tasks/causal_lm; copy takes all if none is given.
        to: the folder to copy to.
    """
    if action not in ("list", "show", "copy"):
        raise TuningError(f"configs {action}: say configs, configs show NAME or configs copy NAME.")
    if action == "list":
        _list()
        return
    if name is None and action == "show":
        raise TuningError("configs show wants the name of one: lightning-peft configs lists them.")
    found = shipped.find(name) if name is not None else None
    if name is not None and found is None:
        raise TuningError(f"{name!r} is no configuration{_nearest(name)}: lightning-peft configs lists them.")
    if action == "show":
        print(found.read_text(encoding="utf-8"), end="")  # type: ignore[union-attr]
        return
    for path in [found] if found is not None else shipped.configurations().values():
        copy = Path(to) / (path.name if found is not None else Path("configs") / path.relative_to(shipped.folder()))
        if copy.exists():
            raise TuningError(f"{copy} exists already: give another folder with --to, or remove it.")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
        print(f"{copy}: use it with --config {copy}")


def _list() -> None:
    table = Table(show_header=False, title="Configurations", title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    folder = ""
    for short, path in shipped.configurations().items():
        place = path.parent.relative_to(shipped.folder()).as_posix()
        if place != folder:
            table.add_section()
            folder = place
        table.add_row(short if place == "." or "/" in short else f"{place}/{short}", _headline(path))
    console = Console()
    console.print(table)
    console.print(
        "The last part of a name is enough: lightning-peft fit --config quickstart --config bitfit. configs show NAME "
        "prints one, configs copy NAME puts it here.",
        highlight=False,
    )


def _headline(path: Path) -> str:
    """Return the first sentence of the comment at the beginning of a file."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    if not lines:
        return path.read_text(encoding="utf-8").partition("\n")[0]
    text = " ".join(lines)
    return re.split(r"(?<=\.) |; ", text, maxsplit=1)[0].rstrip(".:;")


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(Path(name).stem, shipped.configurations(), n=1)
    return f", did you mean {close[0]!r}" if close else ""


def _names_data(value: Any) -> bool:
    """Tell whether a file names the class of the data, and does not just change arguments of it."""
    try:
        path = Path(value)
        content = yaml.safe_load(path.read_text(encoding="utf-8") if path.is_file() else str(value))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False  # what is wrong with it, the parser says
    data = content.get("data") if isinstance(content, dict) else None
    return isinstance(data, str) or (isinstance(data, dict) and "class_path" in data)
