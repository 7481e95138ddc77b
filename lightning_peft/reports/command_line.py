"""A command line as one may show it to others: without folders of this machine, and without secrets."""

import re
import shlex
from collections.abc import Sequence
from pathlib import PurePath

_PATH = re.compile(r"(?:file://|(?<![\w.:/~]))/(?:[^\s/'\",:\]}]+/)*([^\s/'\",:\]}]+)")
_SECRET = re.compile(r"(api_?key|password|secret|\wtoken)$")


def shareable(words: Sequence[str]) -> str:
    """Return a command line whose absolute paths are cut to their last names, and whose secrets are dots.

    >>> shareable(["fit", "--data.train", "/home/me/rows.csv", "--trainer.callbacks=[{dirpath: /tmp/kept}]"])
    "fit --data.train rows.csv '--trainer.callbacks=[{dirpath: kept}]'"
    >>> shareable(["--trainer.logger.init_args.api_key=abc", "--model.hub_token", "abc", "package://a/model", "runs/x"])
    '--trainer.logger.init_args.api_key=... --model.hub_token ... package://a/model runs/x'
    """
    shown: list[str] = []
    follows = False
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        hidden = (follows and not option) or bool(equals and _SECRET.search(option))
        follows = bool(_SECRET.search(option)) and not equals
        shown.append(option + equals + ("..." if hidden else _without_folder(value)))
    return shlex.join(shown)


def _without_folder(value: str) -> str:
    return PurePath(value).name if PurePath(value).is_absolute() else _PATH.sub(r"\1", value)
