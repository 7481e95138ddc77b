"""A parser of the arguments of one command, which says what is wrong in one sentence."""

import re
from typing import NoReturn

from jsonargparse import ArgumentParser

from lightning_peft.commands import fail
from lightning_peft.commands.wording import one_sentence


class ToolParser(ArgumentParser):
    """jsonargparse's parser, but for its errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with one sentence and exit code 2."""
        fail(one_sentence(message, re.findall(r"--([\w.]*\w)", self.format_help())))
