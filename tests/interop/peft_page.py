"""What `peft_suite` has found, as a part of docs/interop.md: counts by kind of model, and what is refused and why."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

START, END = "<!-- make test-peft writes from here -->", "<!-- to here -->"
PARTS = ("import", "export", "steps")


class Said(NamedTuple):
    """What came of a part of a case: the kind of its models, the part, and 'equal', 'WRONG' or why it is refused."""

    group: str
    part: str
    how: str


_REASONS = (
    ("alora_invocation_tokens", "`alora_invocation_tokens`", "an update of some tokens of a text alone"),
    (
        "kasa_config|velora_config|monteclora_config",
        "KaSA, VeLoRA, MonteCLoRA",
        "other updates or gradients than LoRA's",
    ),
    ("use_bdlora", "BD-LoRA", "factors of blocks"),
    ("'mica'", "MiCA", "B stays as it was at the start"),
    (
        "whose update is no change of its weight",
        "DoRA of grouped convolutions",
        "the update is no change of the weight",
    ),
    ("MultiheadAttention", "`nn.MultiheadAttention`", "PEFT adds the update of its out-projection twice"),
    ("has oft_R", "OFT of convolutions", "PEFT adds up patches that overlap, and merged it computes something else"),
    ("no table of word|word table", "trained tokens of a plain network", "it says of no table that it is of words"),
    ("a prefix of PEFT", "prefixes of encoder-decoders", "PEFT's reach the decoder alone, ours all attentions"),
)
"""Part of a refusal -> what is refused, and why."""


def reason_of(how: str) -> tuple[str, str] | None:
    """Return what a refusal is of, and why; None: the page has no row for it."""
    return next(((what, why) for pattern, what, why in _REASONS if re.search(pattern, how)), None)


def page(said: Iterable[Said]) -> str:
    """Return the part of the page.

    >>> page([Said("decoders", part, "equal") for part in PARTS]).splitlines()[-1]
    '| decoders | 1 | 1 | 1 | 1 |'
    """
    said = list(said)
    found = Counter((each.group, each.part, each.how == "equal") for each in said)
    groups = dict.fromkeys(each.group for each in said)
    lines = ["| models | configurations | imported | exported | three steps |", "|---|---|---|---|---|"]
    for group in groups:
        every = found[group, "import", True] + found[group, "import", False]
        lines.append(f"| {group} | {every} | " + " | ".join(str(found[group, part, True]) for part in PARTS) + " |")
    refused = Counter(reason_of(each.how) for each in said if each.part in PARTS and each.how not in ("equal", "WRONG"))
    if refused:
        lines += ["", "| refused | configurations | why |", "|---|---|---|"]
        rows = [(count, *row) for row, count in refused.items() if row is not None]
        lines += [
            f"| {what} | {count} | {why} |" for count, what, why in sorted(rows, key=lambda row: (-row[0], row[1]))
        ]
    return "\n".join(lines)


def write(file: Path, text: str) -> None:
    """Put the text into a page, in the place of what was there."""
    before, _, rest = file.read_text().partition(START)
    file.write_text(f"{before}{START}\n\n{text}\n\n{END}{rest.partition(END)[2]}")
