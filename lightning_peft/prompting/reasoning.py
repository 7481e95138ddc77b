"""Chain of thought: prompts that ask for a rationale, answers found in what a model wrote, votes over several of them.

Sources: few-shot, Wei et al. 2022 (2201.11903); zero-shot in two stages, Kojima et al. 2022 (2205.11916), section 3 and
``utils.py`` of their code; self-consistency, Wang et al. 2022 (2203.11171), section 2. Where code takes the "A" of
"An answer is (C)" for the answer, a letter here is one that stands alone and is no article. Of a text it takes all
lines without their blanks, here it is one line; a rationale stands in the second prompt as it was written, here without
the blanks around it. It reads the last "The answer is" of all that was written, be it of a question that the model has
made up; `PromptedGeneration` cuts that off before.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Literal, TypeAlias

from lightning_peft.core.errors import TuningError
from lightning_peft.prompting.languages import LETTER, Language, language_of, languages
from lightning_peft.prompting.numerals import han_number, numbers, simple

Kind: TypeAlias = Literal["number", "choice", "yes_no", "text"]
Pick: TypeAlias = Literal["first", "last"]
KINDS: tuple[Kind, ...] = ("number", "choice", "yes_no", "text")

STEP_BY_STEP = "Let's think step by step."
"""What the first stage of zero-shot chain of thought begins its answer with."""
_QUOTES = "\"'“”‘’„«»「」『』《》*`"
_STOPS = (".", "。", "．", "।", "！", "；")
_FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
# A sum, or a letter, that an answer begins with: what stands behind the last sign is the answer.
_SUM = re.compile(r"\A[ \t]*[a-zA-Z]?(?:[\d+\-*/×÷·()$€£¥%= \t\\]|,(?=\d{3}(?!\d))|\.(?=\d))*=(?=[ \t]*[-$€£¥]?\d)")


def answer_trigger(
    kind: Kind, choices: str = "ABCDE", after_rationale: bool = True, language: str | Language = "en"
) -> str:
    """Return the phrase by which the second stage asks for the answer; without a rationale before it, no "Therefore".

    >>> answer_trigger("number")
    'Therefore, the answer (arabic numerals) is'
    >>> answer_trigger("choice", after_rationale=False)
    'Among A through E, the answer is'
    >>> answer_trigger("number", language="zh")
    '因此，答案（阿拉伯数字）是'
    """
    _check_kind(kind)
    own = language_of(language)
    words = own.asks[kind].format(first=choices[0], last=choices[-1])
    return f"{own.therefore}{words}" if after_rationale else words[0].upper() + words[1:]


def first_stage(question: str, trigger: str = STEP_BY_STEP) -> str:
    r"""Return the prompt that a rationale follows.

    >>> first_stage("1 + 1?")
    "Q: 1 + 1?\nA: Let's think step by step."
    """
    return f"Q: {question}\nA: {trigger}"


def second_stage(first: str, rationale: str, trigger: str) -> str:
    """Return the prompt that the answer follows; it ends with the trigger."""
    return f"{first} {rationale.strip()} \n{trigger}"


def solved(rationale: str, answer: str, language: str | Language = "en", phrase: str | None = None) -> str:
    """Return the answer of a demonstration with a rationale.

    >>> solved("1 and 1 make 2.", "2")
    '1 and 1 make 2. The answer is 2.'
    >>> solved("5 + 6 = 11。", "11", "zh"), solved("5 + 6 = 11.", "11", phrase="So: {answer}.")
    ('5 + 6 = 11。答案是11。', '5 + 6 = 11. So: 11.')

    Args:
        rationale: what leads to the answer.
        answer: what it is.
        language: of `lightning_peft.prompting.languages`: its code, or a file.
        phrase: the sentence with ``{answer}`` instead of the language's.

    Raises:
        TuningError: there is no such language, or the phrase has no place for the answer.
    """
    own = language_of(language)
    sentence = own.solved if phrase is None else phrase
    if "{answer}" not in sentence:
        raise TuningError(f"phrase={sentence!r} has no place for the answer: write {{answer}} in it.")
    return f"{rationale.strip()}{own.blank}{sentence.replace('{answer}', answer)}".strip()


def extract_answer(
    text: str,
    kind: Kind = "number",
    choices: str = "ABCDE",
    pick: Pick = "last",
    language: str | Language | None = None,
) -> str | None:
    """Return the answer in what a model wrote, or None where there is none.

    What follows the last "answer is", or what another language says there, is read from its beginning; else ``pick``
    says which of several answers counts: the last one of a rationale, the first one after an answer trigger.

    >>> extract_answer("3 and 4 make 7. The answer is 1,234.")
    '1234'
    >>> extract_answer("An answer is (C)", "choice")
    'C'
    >>> extract_answer("所以现在有6 + 3 = 9个。答案是９个。"), extract_answer("Die Antwort ist 1.234,5 kg.")
    ('9', '1234.5')

    Args:
        text: what the model wrote.
        kind: ``number`` (without thousands separators and trailing zeros), ``choice`` (a letter of ``choices``),
            ``yes_no`` ("yes" or "no"), or ``text`` (one line, without its final stop).
        choices: the letters to choose from.
        pick: "first" or "last".
        language: whose phrases, words and decimal mark count: a code of `lightning_peft.prompting.languages` or a file;
            None: the phrases and words of all, the decimal mark of that whose phrase was found, else a point.

    Raises:
        TuningError: there is no such kind or language.
    """
    _check_kind(kind)
    plain = simple(text := unicodedata.normalize("NFC", text))
    known = [language_of(language)] if language is not None else list(languages().values())
    own, start = _after_phrase(plain, known)
    first, rest = own is not None or pick == "first", plain[start:]
    if kind == "text":
        return _line(text[start:], first, own)
    found = _answers(rest, kind, choices, known, own, first)
    return found[0 if first else -1] if found else None


def _answers(
    text: str, kind: Kind, choices: str, known: Sequence[Language], own: Language | None, first: bool
) -> list[str]:
    """Return the answers of a kind in a text, in their order, or that with which an answer begins."""
    if kind != "number":
        return _letters(text, choices, own is not None) if kind == "choice" else _yes_no(text, known)
    text = _FRACTION.sub(r"\1/\2", _signed(text, known) if first else text)
    if first and (number := han_number(text)):
        return [number]
    return numbers(_SUM.sub("", text) if first else text, (own or known[0]).decimal)  # English is first


def _signed(text: str, known: Sequence[Language]) -> str:
    """Return a text with the sign in place of a word for it that it begins with."""
    words = "|".join(re.escape(word) for language in known for word in language.minus)
    return re.sub(rf"^[\s:]*(?:{words})\s*(?=\d)", "-", text, flags=re.IGNORECASE) if words else text


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


def _after_phrase(text: str, known: Sequence[Language]) -> tuple[Language | None, int]:
    """Return the language of the last phrase that stands before an answer, and where that phrase ends; else None, 0."""
    found: Language | None = None
    start = 0
    for language in known:
        for match in language.phrase.finditer(text):
            if found is None or match.end() > start:
                found, start = language, match.end()
    return found, start


def _yes_no(text: str, known: Sequence[Language]) -> list[str]:
    """Return the words for yes and no of some languages, in the order of the text."""
    found: dict[int, str] = {}
    for language in known:
        for match in language.yes_no.finditer(text):
            found.setdefault(match.start(), "yes" if match["yes"] else "no")
    return [found[place] for place in sorted(found)]


def _letters(text: str, choices: str, is_answer: bool) -> list[str]:
    """Return the letters of a text that may be answers; of an answer, the one that it begins with, if there is one."""
    letters = re.escape(choices.upper() + choices.lower())
    # A small letter before a word is an article there, and an I a pronoun.
    begun = re.match(rf"[\W_]*(?![a-zI]\s+{LETTER})([{letters}])(?!{LETTER})(?!['’])", text) if is_answer else None
    if begun:
        return [begun[1].upper()]
    bracketed = re.findall(rf"\(([{letters}])\)", text)
    if bracketed:
        return [letter.upper() for letter in bracketed]
    # A letter before a word is an article ("A dog") or a pronoun ("I think").
    # Kana are letters to choose from, too, but not within a word.
    before, behind = rf"(?<!{LETTER})(?<!['’])(?<![ァ-ヺー])", rf"(?!{LETTER})(?!['’])(?![ァ-ヺー])(?!\s+[a-z])"
    alone = rf"{before}([{re.escape(choices.upper())}]){behind}"
    return re.findall(alone, text)


def _line(text: str, first: bool, language: Language | None) -> str | None:
    """Return the first or last line with words, without quotation marks, the stop, and what ends the sentence."""
    lines = [_bare(line.strip(), language.ends if language else ()) for line in text.splitlines()]
    lines = [line for line in lines if line]
    return (lines[0] if first else lines[-1]) if lines else None


def _bare(line: str, ends: Sequence[str]) -> str:
    """Return a line without its stop, one end of its sentence, and quotation marks, in whatever order they stand."""
    for _ in range(2):
        for stop in _STOPS:
            line = line.removesuffix(stop)
        end = next((end for end in ends if line.endswith(end)), None)
        if end is not None:
            line, ends = line.removesuffix(end), ()
        line = line.strip(f"{_QUOTES} ")
    return line


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise TuningError(f"kind={kind!r} is no kind of answer: take {', '.join(KINDS)}.")
