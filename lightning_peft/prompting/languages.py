"""What a language says around an answer: phrases that lead to one, yes and no, how it writes numbers and words.

The table is `languages.yaml` beside this file. An entry of a language:

============= =========================================================================================================
``says``      what stands right before an answer; one that ends with a colon needs it, after the others it may stand
``solved``    the sentence that ends a solved example, with ``{answer}``
``steps``     what a rationale begins with
``therefore`` what comes before the question for the answer
``asks``      how an answer is asked for: ``number``, ``choice`` (with ``{first}``, ``{last}``), ``yes_no``, ``text``
``affirms``   the words for yes
``denies``    the words for no
``minus``     the words for the sign of a negative number
``ends``      what may follow an answer in its sentence and is none of it, as the Japanese です
``articles``  words that do not count when two answers are compared
``decimal``   the mark before decimals, "." or ","
``bleu``      how sacreBLEU splits its texts into words
``spaced``    whether blanks stand between words
============= =========================================================================================================
"""

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from lightning_peft.core.errors import TuningError
from lightning_peft.prompting.yaml_files import read_mapping

_TABLE = Path(__file__).with_name("languages.yaml")
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai and Lao, Burmese, Khmer
    "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"  # Han, kana, hangul
)
"""Letters of scripts that write words, or their endings, without a blank between: Thai to Han, kana and hangul."""
LETTER = rf"[^\W{UNSPACED}]"
"""A letter or digit that belongs to the word beside it."""


@dataclass(frozen=True)
class Language:
    """What a language says around an answer; the entries are explained in this module.

    Raises:
        TuningError: a text lacks its slot, or ``asks`` a kind of answer.
    """

    says: tuple[str, ...]
    solved: str
    steps: str
    therefore: str
    asks: Mapping[str, str]
    affirms: tuple[str, ...]
    denies: tuple[str, ...]
    minus: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    articles: tuple[str, ...] = ()
    decimal: str = "."
    bleu: str = "13a"
    spaced: bool = True

    def __post_init__(self) -> None:
        if "{answer}" not in self.solved:
            raise TuningError(f"solved={self.solved!r} has no place for the answer: write {{answer}} in it.")
        missing = [kind for kind in ("number", "choice", "yes_no", "text") if kind not in self.asks]
        if missing:
            raise TuningError(f"asks lacks {missing[0]!r}: say how the language asks for this kind of answer.")
        if self.decimal not in (".", ","):
            raise TuningError(f"decimal={self.decimal!r} is no mark before decimals: take '.' or ','.")
        if not self.says:
            raise TuningError("says is empty: give a phrase that stands before an answer.")

    @property
    def blank(self) -> str:
        """What stands between two sentences."""
        return " " if self.spaced else ""

    @cached_property
    def phrase(self) -> re.Pattern[str]:
        """Finds what stands before an answer, in a text with simple digits and punctuation."""
        return re.compile("|".join(_phrase(words) for words in sorted(self.says, key=len, reverse=True)), re.IGNORECASE)

    @cached_property
    def yes_no(self) -> re.Pattern[str]:
        """Finds yes and no where they stand alone; the group ``yes`` has the first."""
        ends = f"(?:{'|'.join(map(re.escape, self.ends))})?" if self.ends else ""
        kinds = (
            "|".join(map(re.escape, sorted(words, key=len, reverse=True))) for words in (self.affirms, self.denies)
        )
        yes, no = kinds
        return re.compile(rf"(?<!\w)(?<!\w-)(?:(?P<yes>{yes})|(?:{no}))(?={ends}(?!\w))(?!-\w)", re.IGNORECASE)


def language_of(name: str | Language) -> Language:
    """Return a language of the table, or that of a YAML file.

    >>> language_of("zh").solved
    '答案是{answer}。'

    Args:
        name: a code of the table such as "zh", the path of a YAML file with the entries of one language, or a language.

    Raises:
        TuningError: there is none, or an entry is missing or unknown.
    """
    if isinstance(name, Language):
        return name
    if name.endswith((".yaml", ".yml")):
        return _read(Path(name))
    table = languages()
    if name not in table:
        raise TuningError(
            f"language={name!r} is not in the table: take one of {', '.join(table)}, or give the path of a YAML file "
            "with its phrases."
        )
    return table[name]


@cache
def languages() -> dict[str, Language]:
    """Return the languages of the table, by their codes."""
    return {code: _made(parts, code) for code, parts in yaml.safe_load(_TABLE.read_text(encoding="utf-8")).items()}


@cache
def _read(path: Path) -> Language:
    if not path.is_file():
        raise TuningError(f"language={str(path)!r} is no file: give a YAML file with the phrases of a language.")
    return _made(read_mapping(path, ", ".join(_entries())), str(path))


def _made(parts: Mapping[str, Any], where: str) -> Language:
    known = _entries()
    unknown = [name for name in parts if name not in known]
    if unknown:
        raise TuningError(f"{where}: {unknown[0]!r} is no entry of a language: take {', '.join(known)}.")
    missing = [name for name, needed in known.items() if needed and name not in parts]
    if missing:
        raise TuningError(f"{where} lacks {missing[0]!r}: a language needs {', '.join(n for n in known if known[n])}.")
    own: dict[str, Any] = {
        n: tuple(map(str, value)) if isinstance(value, list) else value for n, value in parts.items()
    }
    try:
        return Language(**own)
    except TuningError as error:
        raise TuningError(f"{where}: {error}") from None


def _entries() -> dict[str, bool]:
    """Return the entries of a language, and whether each is needed."""
    return {entry.name: entry.default is MISSING for entry in fields(Language)}


def _phrase(words: str) -> str:
    """Return the pattern of a phrase: whole words, any blanks between them, and the colon behind it."""
    needs_colon = words.endswith(":")
    bare = words.removesuffix(":")
    middle = r"\s+".join(map(re.escape, bare.split()))
    start = rf"(?<!{LETTER})" if re.match(LETTER, bare) else ""
    end = rf"(?!{LETTER})" if re.search(rf"{LETTER}$", bare) else ""
    return rf"{start}{middle}{end}\s*:{'' if needs_colon else '?'}"
