"""What the console script can do, and how it fails."""

from typing import NoReturn


def fail(sentence: str, code: int = 2) -> NoReturn:
    """Print one red sentence to stderr and end."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text(sentence, style="bold red"))
    raise SystemExit(code)
