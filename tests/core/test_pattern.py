"""Patterns that a file may hold end, whatever they are, and match what Python's own do."""

import contextlib
import re
import time

import pytest

from lightning_peft import LoRA, TuningError
from lightning_peft.core.pattern import Pattern, pattern
from lightning_peft.core.select import match
from tests.models import tiny

NAMES = [f"bert.encoder.layer.{i}.attention.self.{part}" for i in range(12) for part in ("query", "key", "value")]
HOSTILE = (
    r"(([a-z_\.0-9])+)+!",
    r"(a|aa)+!",
    r"(.*)*x",
    r"(?:(?:[a-z]+\.?)*)*\d$",
    r"((a{1,1000}){1,1000}){1,1000}b",
    r"(.*)(.*)(.*)(.*)(.*)(.*)\1\2\3\4x",
    r"(?=(\w+\.)+)(\1*)*y",
    r"^(([a-z])+.)+[A-Z]([a-z])+$",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_pattern_ends(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_peft.core.pattern.SECONDS", 0.1)
    pattern.cache_clear()
    begin = time.thread_time()
    with contextlib.suppress(TuningError):  # it takes too long
        assert match([*NAMES, "a" * 39, "bert" * 50], text)[text] == []
    assert time.thread_time() - begin < 8


@pytest.mark.parametrize("text", ["(" * 3000 + ")" * 3000, "a{99999999999999}", "[", "(?P<a>", "*", "\\"])
def test_what_is_no_pattern_is_one_sentence(text: str) -> None:
    with pytest.raises(TuningError, match=r"is no regular expression .*: escape it or give a list of suffixes"):
        Pattern(text)


def test_a_pattern_that_has_taken_long_gets_no_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_peft.core.pattern.SECONDS", 0.05)
    slow = Pattern(HOSTILE[4], "delta.ckpt")
    with pytest.raises(TuningError, match=r"in delta\.ckpt takes too long"):
        [slow.fullmatch("a" * 39) for _ in range(100)]


@pytest.mark.parametrize(
    "text",
    [
        r".*(query|value)",
        r"bert\.encoder\.layer\.[0-5]\.(?:.*)",
        r"(?!.*key).*layer\.1\d\..*",
        r"(?:.*\.)?(?:q|query)",
        r".*self\.(?P<part>\w+)(?<!ue)",
        r"(?i).*QUERY",
    ],
)
def test_it_matches_what_python_does(text: str) -> None:
    assert match(NAMES, text)[text] == [name for name in NAMES if re.fullmatch(text, name)]
    assert pattern(text) is pattern(text)


@pytest.mark.parametrize("argument", ["target_modules", "exclude", "also_train"])
def test_a_method_has_the_limit(argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_peft.core.pattern.SECONDS", 0.1)
    text = r"(((\w|\.){1,500}){1,500}){1,500}!"
    begin = time.thread_time()
    with pytest.raises(TuningError, match=r"takes too long|matches no"):
        LoRA(**{argument: text}).apply(tiny("bert"))  # type: ignore[arg-type]
    assert time.thread_time() - begin < 8
