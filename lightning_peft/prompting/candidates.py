"""Candidates for templates: mined from a text, paraphrased, and edited word by word; slots are never touched.

Sources: mining and paraphrasing, Jiang et al. 2020 (1911.12543), sections 3.1 and 3.2; edits (delete, swap, paraphrase,
add again what was deleted), Prasad et al. 2022 (2203.07281), section 3, whose phrases are those of a parser, and here
runs of one to three words.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lightning_peft.core.errors import TuningError
from lightning_peft.prompting.languages import UNSPACED
from lightning_peft.prompting.template import Template

_PIECE = re.compile(rf"\{{\{{|\}}\}}|\{{[^{{}}]*\}}|\s+|[{UNSPACED}]|[^\s{{}}{UNSPACED}]+")
LONGEST = 3
"""How many words an edit deletes or adds at most."""
Synonyms = Mapping[str, Sequence[str]]


def listed(path: str) -> list[str]:
    r"""Return the templates of a file, one a line, ``\n`` standing for a new line.

    Raises:
        TuningError: there is no such file, it is empty, or a line is no template.
    """
    lines = [line.replace("\\n", "\n") for line in lines_of(path) if line.strip()]
    if not lines:
        raise TuningError(f"{path} holds no templates: write one a line.")
    return [Template(line).text for line in lines]


def synonyms_of(path: str) -> dict[str, list[str]]:
    """Return the paraphrases of words of a file: ``word: other, another``, one word a line.

    Raises:
        TuningError: there is no such file, or a line has no colon.
    """
    found: dict[str, list[str]] = {}
    for line in lines_of(path):
        word, colon, others = line.partition(":")
        if not line.strip():
            continue
        if not colon or not others.strip():
            raise TuningError(f"{path} has the line {line!r}: write a word, a colon, and paraphrases with commas.")
        found.setdefault(word.strip(), []).extend(other.strip() for other in others.split(",") if other.strip())
    return found


def mined(lines: Iterable[str], pairs: Sequence[tuple[str, str]], field: str, slot: str, most: int) -> list[str]:
    """Return the templates by which a text tells pairs, the most frequent first.

    >>> mined(["ana lives in lund .", "bea lives in berg ."], [("ana", "lund"), ("bea", "berg")], "sub", "mask", 5)
    ['{sub} lives in {mask} .']

    Args:
        lines: sentences.
        pairs: what a row asks about, and the answer.
        field: the field of the first.
        slot: what stands for the answer: "mask" or "answer".
        most: how many templates.
    """
    counts: Counter[str] = Counter()
    for line in lines:
        plain = line.strip().replace("{", "{{").replace("}", "}}")
        for subject, answer in pairs:
            whole = [re.compile(rf"(?<!\w){re.escape(word)}(?!\w)|{_unspaced(word)}") for word in (subject, answer)]
            if subject and answer and len(whole[0].findall(plain)) == len(whole[1].findall(plain)) == 1:
                text = whole[1].sub(f"{{{slot}}}", whole[0].sub(f"{{{field}}}", plain))
                counts[text] += f"{{{field}}}" in text and f"{{{slot}}}" in text
    return [text for text, count in counts.most_common(most) if count]


def paraphrased(template: str, synonyms: Synonyms) -> list[str]:
    """Return the template with one of its words in other words, for each paraphrase.

    >>> paraphrased("{text} It was {mask}.", {"was": ["seemed", "felt"]})
    ['{text} It seemed {mask}.', '{text} It felt {mask}.']
    """
    pieces = pieces_of(template)
    return [
        "".join([*pieces[:place], other, *pieces[place + 1 :]])
        for place in words_in(pieces)
        for other in synonyms.get(pieces[place], ())
    ]


class Editor:
    """Draws edits of templates.

    Args:
        seed: of the draws.
        synonyms: paraphrases of words; without any, words are deleted, swapped and added again alone.
    """

    def __init__(self, seed: int, synonyms: Synonyms) -> None:
        self.draw, self.synonyms = random.Random(seed), synonyms
        self.deleted: list[list[str]] = []

    def edits(self, template: str, count: int, known: Iterable[str]) -> dict[str, str]:
        """Return up to ``count`` new templates, and what has been done to each."""
        found: dict[str, str] = {}
        seen = {*known, template}
        ways = {"delete": self._delete, "swap": self._swap, "add": self._add, "paraphrase": self._say}
        for _ in range(20 * count):
            kind = self.draw.choice(list(ways))
            text = ways[kind](template)
            if text is not None and text not in seen and _is_template(text):
                seen.add(text)
                found[text] = kind
            if len(found) == count:
                break
        return found

    def _delete(self, template: str) -> str | None:
        pieces = pieces_of(template)
        places = words_in(pieces)
        if not places:
            return None
        first = self.draw.randrange(len(places))
        chosen = places[first : first + self.draw.randint(1, LONGEST)]
        run = [p for i, p in enumerate(chosen) if not i or not _slot_between(pieces, chosen[i - 1], p)]
        self.deleted.append([pieces[place] for place in run])
        return _tidy("".join(piece for place, piece in enumerate(pieces) if place not in run))

    def _swap(self, template: str) -> str | None:
        pieces = pieces_of(template)
        places = words_in(pieces)
        if len(places) < 2:
            return None
        one, two = self.draw.sample(places, 2)
        pieces[one], pieces[two] = pieces[two], pieces[one]
        return "".join(pieces)

    def _add(self, template: str) -> str | None:
        pieces = pieces_of(template)
        places = words_in(pieces)
        if not self.deleted or not places:
            return None
        words = self.draw.choice(self.deleted)
        glue = "" if re.fullmatch(f"[{UNSPACED}]", words[-1]) else " "
        place = self.draw.choice(places)
        return "".join([*pieces[:place], glue.join(words) + glue, *pieces[place:]])

    def _say(self, template: str) -> str | None:
        others = paraphrased(template, self.synonyms)
        return self.draw.choice(others) if others else None


def pieces_of(template: str) -> list[str]:
    """Return the words, blanks and slots of a template, in order; characters where there are no blanks."""
    return _PIECE.findall(template)


def words_in(pieces: Sequence[str]) -> list[int]:
    """Return which pieces are words."""
    return [place for place, piece in enumerate(pieces) if piece[0] not in "{}" and any(c.isalnum() for c in piece)]


def _slot_between(pieces: Sequence[str], one: int, two: int) -> bool:
    return any(piece[0] == "{" for piece in pieces[one:two])


def _tidy(text: str) -> str:
    return re.sub(r" {2,}", " ", text)


def _is_template(text: str) -> bool:
    try:
        Template(text)
    except TuningError:
        return False
    return True


def _unspaced(word: str) -> str:
    return re.escape(word) if re.search(f"[{UNSPACED}]", word) else r"(?!)"


def lines_of(path: str) -> list[str]:
    """Return the lines of a text file.

    Raises:
        TuningError: there is no such file.
    """
    if not Path(path).is_file():
        raise TuningError(f"{path} is no file: give the path of a text file.")
    return Path(path).read_text(encoding="utf-8").splitlines()
