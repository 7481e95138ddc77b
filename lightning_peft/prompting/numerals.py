"""Numbers in a text, in the digits and marks of any language; the values are decimal numbers with a point.

Digits of any script count as such, full-width ones too; ``1,234.5`` and ``1.234,5`` are read by the mark before
decimals of the language; a number may touch letters of a script without blanks ("9个苹果") and no other ("x2"). A 万 or
亿 behind digits multiplies them, and where an answer holds no digits, a number in Han numerals counts.
"""

import re
import unicodedata
from decimal import Decimal
from functools import cache

from lightning_peft.prompting.languages import LETTER

_BETWEEN_WIDE = re.compile(r"(?<=[０-９])，(?=[０-９]{3}(?![０-９]))")
_MARKS = str.maketrans("（）［］：；？！，．％＋－−﹣＊／＝٫٬", "()[]:;?!\uff0c.%+---*/=.,")
"""Marks and what they are read as; the full-width comma stays: in Chinese it ends a clause."""
_HAN = re.compile(r"\s*(负?[零〇一二两三四五六七八九十百千万亿兩萬億]+)")
_HAN_DIGITS = {character: value for value, character in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2, "兩": 2}
_HAN_UNITS = {"十": 10, "百": 100, "千": 1000}
_MYRIADS = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}


def simple(text: str) -> str:
    """Return a text of the same length with ASCII digits, Latin letters, brackets and points for full-width ones.

    >>> simple("答案是（Ａ）：１，２３４")
    '答案是(A):1,234'
    """
    text = _BETWEEN_WIDE.sub(",", text)
    return "".join(_plain_letter(character) for character in text).translate(_MARKS)


def numbers(text: str, decimal: str = ".") -> list[str]:
    """Return the numbers in a text that is `simple`, without thousands separators and trailing zeros.

    >>> numbers("共3盒，每盒5个，$1,234.50"), numbers("1.234,5 kg", decimal=",")
    (['3', '5', '1234.5'], ['1234.5'])
    """
    found = []
    for match in _pattern(decimal).finditer(text):
        value = _value(match[0], decimal)
        unit = _MYRIADS.get(text[match.end() : match.end() + 1])
        found.append(value if unit is None else _written(Decimal(value) * unit))
    return found


def han_number(text: str) -> str | None:
    """Return the number in Han numerals that a text begins with, or None.

    >>> han_number("三百零五个"), han_number("十二"), han_number("二〇二四年"), han_number("苹果")
    ('305', '12', '2024', None)
    """
    match = _HAN.match(text)
    if match is None:
        return None
    sign, numerals = ("-", match[1][1:]) if match[1].startswith("负") else ("", match[1])
    if all(character in _HAN_DIGITS for character in numerals):
        return sign + (numerals if not numerals else str(int("".join(str(_HAN_DIGITS[c]) for c in numerals))))
    total = section = digit = 0
    for character in numerals:
        if character in _HAN_DIGITS:
            digit = _HAN_DIGITS[character]
        elif character in _HAN_UNITS:
            section += (digit or 1) * _HAN_UNITS[character]
            digit = 0
        else:
            unit, part = _MYRIADS[character], section + digit
            total = (total + part or 1) * unit if total < unit else total + part * unit
            section = digit = 0
    return f"{sign}{total + section + digit}"


def _plain_letter(character: str) -> str:
    if "\uff10" <= character <= "\uff5a" and character.isalnum():  # full-width digits and Latin letters
        return chr(ord(character) - 0xFEE0)
    if character.isdecimal() and not character.isascii():
        return str(unicodedata.decimal(character))
    return character


@cache
def _pattern(decimal: str) -> re.Pattern[str]:
    # What code writes as 1.5 is no thousand in a language that writes 1,5.
    group, mark = (",", r"\.") if decimal == "." else (r"\.", r"(?:,|\.(?!\d{3}(?!\d)))")
    group = rf"[{group}\u00a0\u202f]"
    alone = rf"(?<!{LETTER})(?<!\.)-?"
    return re.compile(rf"{alone}(?:\d{{1,3}}(?:{group}\d{{3}})+(?!\d)|\d+)(?:{mark}\d+)?|{alone}{mark}\d+")


def _value(number: str, decimal: str) -> str:
    for blank in ("\u00a0", "\u202f"):
        number = number.replace(blank, "")
    if decimal == ".":
        number = number.replace(",", "")
    elif "," in number or re.fullmatch(r"-?\d{1,3}(\.\d{3})+", number):
        number = number.replace(".", "").replace(",", ".")
    if "." in number:
        number = number.rstrip("0").rstrip(".")
        number = re.sub(r"^(-?)\.", r"\g<1>0.", number)
    return number


def _written(value: Decimal) -> str:
    return format(value.normalize(), "f")
