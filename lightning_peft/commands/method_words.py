"""Methods as words of a command line: ``LoRA``, ``"PromptTuning(num_virtual_tokens=50)"``, ``"LoRA(r=4) + BitFit"``."""

import ast
from collections.abc import Iterator

from lightning_peft.core.errors import TuningError
from lightning_peft.core.select import near
from lightning_peft.methods import every_method
from lightning_peft.reports.parameters import repr_short
from lightning_peft.training.method import Method


def methods_of(word: str) -> list[Method]:
    """Return new methods, as a word says.

    >>> methods_of("LoRA(r=4) + BitFit")[0].r
    4

    Raises:
        TuningError: it names no method, or gives one an argument that it has not.
    """
    try:
        tree = ast.parse(word.strip(), mode="eval").body
        return [_method(part, word) for part in _parts(tree)]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        if isinstance(error, TuningError):
            raise
        reason = str(error).partition("\n")[0]
        raise TuningError(
            f"{word[:80]!r} is no method ({reason}): write it as LoRA, 'LoRA(r=4)' or 'LoRA(r=4) + BitFit'."
        ) from None


def name_of(word: str) -> str:
    """Return how a word is written where spaces, order and defaults do not count.

    >>> name_of("LoRA( r = 8,alpha=32)")
    'LoRA(alpha=32)'
    """
    return " + ".join(repr_short(method).removesuffix("()") for method in methods_of(word))


def _parts(tree: ast.expr) -> Iterator[ast.expr]:
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        yield from (*_parts(tree.left), *_parts(tree.right))
    else:
        yield tree


def _method(part: ast.expr, word: str) -> Method:
    call = part if isinstance(part, ast.Call) else ast.Call(part, [], [])
    if not isinstance(call.func, ast.Name) or call.args or any(each.arg is None for each in call.keywords):
        raise ValueError("a method is called with names and values")
    known = every_method()
    if call.func.id not in known:
        raise TuningError(f"{call.func.id!r} of {word[:80]!r} is no method{near(call.func.id, known)}.")
    given = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
    made = known[call.func.id](**given)
    assert isinstance(made, Method)
    return made
