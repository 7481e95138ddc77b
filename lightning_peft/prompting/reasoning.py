"""Chain of thought: prompts that ask for a rationale, answers found in what a model wrote, votes over several of them.

Sources: few-shot, Wei et al. 2022 (2201.11903); zero-shot in two stages, Kojima et al. 2022 (2205.11916), section 3 and
``utils.py`` of their code; self-consistency, Wang et al. 2022 (2203.11171), section 2. Where code takes the "A" of
"An answer is (C)" for the answer, a letter here is one that stands alone and is no article.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal, TypeAlias

from lightning_peft.core.errors import TuningError

Kind: TypeAlias = Literal["number", "choice", "yes_no", "text"]
Pick: TypeAlias = Literal["first", "last"]
KINDS: tuple[Kind, ...] = ("number", "choice", "yes_no", "text")

STEP_BY_STEP = "Let's think step by step."
"""What the first stage of zero-shot chain of thought begins its answer with."""
_FORM = {"number": " (arabic numerals)", "yes_no": " (Yes or No)", "text": ""}
_PHRASE = re.compile(r"\banswer\s+is\b\s*:?", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.])[-−]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])[-−]?\.\d+")
_YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def answer_trigger(kind: Kind, choices: str = "ABCDE", after_rationale: bool = True) -> str:
    """Return the phrase by which the second stage asks for the answer; without a rationale before it, no "Therefore".

    >>> answer_trigger("number")
    'Therefore, the answer (arabic numerals) is'
    >>> answer_trigger("choice", after_rationale=False)
    'Among A through E, the answer is'
    """
    _check_kind(kind)
    among = f"among {choices[0]} through {choices[-1]}, the answer is"
    words = among if kind == "choice" else f"the answer{_FORM[kind]} is"
    return f"Therefore, {words}" if after_rationale else words[0].upper() + words[1:]


def first_stage(question: str, trigger: str = STEP_BY_STEP) -> str:
    r"""Return the prompt that a rationale follows.

    >>> first_stage("1 + 1?")
    "Q: 1 + 1?\nA: Let's think step by step."
    """
    return f"Q: {question}\nA: {trigger}"


def second_stage(first: str, rationale: str, trigger: str) -> str:
    """Return the prompt that the answer follows; it ends with the trigger."""
    return f"{first} {rationale.strip()} \n{trigger}"


def solved(rationale: str, answer: str) -> str:
    """Return the answer of a demonstration with a rationale.

    >>> solved("1 and 1 make 2.", "2")
    '1 and 1 make 2. The answer is 2.'
    """
    return f"{rationale.strip()} The answer is {answer}.".strip()


def extract_answer(text: str, kind: Kind = "number", choices: str = "ABCDE", pick: Pick = "last") -> str | None:
    """Return the answer in what a model wrote, or None where there is none.

    What follows the last "answer is" is read from its beginning; where those words are missing, ``pick`` says which of
    several answers counts: the last one of a rationale, the first one after an answer trigger.

    >>> extract_answer("3 and 4 make 7. The answer is 1,234.")
    '1234'
    >>> extract_answer("An answer is (C)", "choice")
    'C'
    >>> extract_answer("So I cannot tell.", "yes_no") is None
    True

    Args:
        text: what the model wrote.
        kind: ``number`` (without thousands separators and trailing zeros), ``choice`` (a letter of ``choices``),
            ``yes_no`` ("yes" or "no"), or ``text`` (one line, without its final stop).
        choices: the letters to choose from.
        pick: "first" or "last".

    Raises:
        TuningError: there is no such kind.
    """
    _check_kind(kind)
    segments = _PHRASE.split(text)
    said = len(segments) > 1
    segment = segments[-1]
    if kind == "text":
        return _line(segment, "first" if said else pick)
    found = {"number": _numbers, "yes_no": _words}[kind](segment) if kind != "choice" else _letters(segment, choices)
    if not found:
        return None
    return found[0 if said or pick == "first" else -1]


def majority(answers: Sequence[str | None], scores: Sequence[float] | None = None) -> str | None:
    """Return the answer that occurs most often; paths without an answer have no vote.

    Of answers with equally many votes, that with the higher mean score wins (of log-likelihoods a token, say), then the
    one that came first.

    >>> majority(["a", "b", None, None, None, "b"])
    'b'
    >>> majority(["a", "b"]), majority(["a", "b"], scores=[-2.0, -1.0]), majority([None])
    ('a', 'b', None)
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if scores is not None and len(scores) != len(answers):
        raise TuningError(f"{len(answers)} answers have {len(scores)} scores: give one for each.")

    def rank(answer: str) -> tuple[int, float]:
        own = [scores[i] for i, other in enumerate(answers) if other == answer] if scores is not None else [0.0]
        return votes[answer], sum(own) / len(own)

    return max(votes, key=rank, default=None)  # the first of equals: a Counter keeps the order of arrival


def _numbers(text: str) -> list[str]:
    return [_plain(found) for found in _NUMBER.findall(text)]


def _plain(number: str) -> str:
    number = number.replace(",", "").replace("−", "-")
    if "." in number:
        number = number.rstrip("0").rstrip(".")
        number = re.sub(r"^(-?)\.", r"\g<1>0.", number)
    return number


def _words(text: str) -> list[str]:
    return [found.lower() for found in _YES_NO.findall(text)]


def _letters(text: str, choices: str) -> list[str]:
    letters = re.escape(choices.upper() + choices.lower())
    bracketed = re.findall(rf"\(([{letters}])\)", text)
    if bracketed:
        return [letter.upper() for letter in bracketed]
    # A letter before a word is an article ("A dog") or a pronoun ("I think").
    alone = rf"(?<![\w'’])([{re.escape(choices.upper())}])(?![\w'’])(?!\s+[a-z])"
    return re.findall(alone, text)


def _line(text: str, pick: Pick) -> str | None:
    lines = [line.strip().strip("\"'“”").removesuffix(".").strip("\"'“” ") for line in text.splitlines()]
    lines = [line for line in lines if line]
    return (lines[0] if pick == "first" else lines[-1]) if lines else None


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise TuningError(f"kind={kind!r} is no kind of answer: take {', '.join(KINDS)}.")
