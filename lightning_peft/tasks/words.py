"""The words of a text, for metrics: single characters where a script puts no blanks between words.

Source: the mixed segmentation of MLQA's evaluation, Lewis et al. 2019 (1910.07475): Han characters alone, other words
whole; punctuation and articles do not count.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from lightning_peft.prompting.languages import UNSPACED, Language
from lightning_peft.prompting.numerals import simple

_WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, with plain digits and letters for full-width ones.

    >>> words_of("他有３个 iPhone。"), words_of("Fünf Äpfel!")
    (['他', '有', '3', '个', 'iphone'], ['fünf', 'äpfel'])
    """
    return _WORD.findall(simple(unicodedata.normalize("NFC", text)).lower())


def answer_scores(text: str, answers: Sequence[str], language: Language) -> tuple[float, float]:
    """Return exact match and F1 of an answer, the best over the right ones, by the words of a language.

    >>> from lightning_peft.prompting.languages import language_of
    >>> answer_scores("北京市", ["北京", "上海"], language_of("zh"))
    (0.0, 0.8)
    """
    own = _counted(text, language)
    exact, best = 0.0, 0.0
    for answer in answers:
        right = _counted(answer, language)
        exact = max(exact, float(own == right))
        if not own or not right:
            best = max(best, float(own == right))
            continue
        common = sum((Counter(own) & Counter(right)).values())
        best = max(best, 2 * common / (len(own) + len(right)))
    return exact, best


def _counted(text: str, language: Language) -> list[str]:
    return [word for word in words_of(text) if word not in language.articles]
