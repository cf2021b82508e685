"""Personal data that has a form is masked before any prompt: mail, card, IBAN, phone, and names that a key lists.

A card number passes the Luhn test (ISO/IEC 7812-1) and an IBAN its check digits and the length of its country
(ISO 13616); what fails them may be any number. Where a number could be a phone or something else, it is masked: a
masked order number costs less than a phone number shown. Addresses, and names that nobody listed, have no form; for
those there are the rules in the prompts and the audit.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\u00ad"
# What people write between the digits of one number.
_GAP = rf"[ \t.\-–—/()\u00a0\u2009\u202f\u2011{_INVISIBLE}]{{0,3}}"

_MAIL = re.compile(r"[\w.+%'-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")
_IBAN_START = re.compile(r"(?<![^\W_])[A-Za-z]{2}\d{2}(?=[ \-\u00a0]?[A-Za-z0-9])")
_DIGIT_RUN = re.compile(rf"[+(]?\d(?:{_GAP}\d)+")
_DATE = re.compile(r"(?:\d{4}[-./]\d{1,2}[-./]\d{1,2}|\d{1,2}[-./]\d{1,2}[-./](?:\d{4}|\d{2}))(?!\d)")
_SHORT_PHONE = re.compile(r"\d{3}[-.]\d{4}|\d{3}-\d{2}-\d{2}")

_MIN_CARD, _MAX_CARD = 13, 19
_CARD_STARTS = "23456"  # of the networks that issue payment cards
_MIN_PHONE, _MAX_PHONE = 9, 15

_IBAN_LENGTHS = (
    "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29 "
    "ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 "
    "LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 "
    "PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 "
    "YE30"
)
_LENGTH_OF = {entry[:2]: int(entry[2:]) for entry in _IBAN_LENGTHS.split()}


class Masker:
    """Masks texts and counts what it masked, by kind; an empty one masks nothing."""

    def __init__(self, *, enabled: bool = True, names: Sequence[str] = ()) -> None:
        self.enabled = enabled
        self.counts: Counter[str] = Counter()  # mail, card, iban, phone, name
        # The longest first, so that "Ann Lee" is one name and not the name "Ann" with a word after it.
        listed = sorted((name.strip() for name in names if name.strip()), key=len, reverse=True)
        words = (r"\s+".join(map(re.escape, name.split())) for name in listed)
        pattern = "|".join(words)
        self._names = re.compile(rf"(?<!\w)(?:{pattern})(?!\w)", re.IGNORECASE) if pattern else None

    def mask(self, text: str) -> str:
        """The text with `[mail]`, `[iban]`, `[card]`, `[phone]` and `[name]` in the place of what they name."""
        if not self.enabled or not text:
            return text
        text = self._replace(text, "mail", ((match.span()) for match in _MAIL.finditer(text)))
        text = self._replace(text, "iban", iban_spans(text))
        text = self._replace(text, "card", card_spans(text))
        text = self._replace(text, "phone", phone_spans(text))
        if self._names is not None:
            text = self._replace(text, "name", ((match.span()) for match in self._names.finditer(text)))
        return text

    def _replace(self, text: str, kind: str, spans: Iterator[tuple[int, int]]) -> str:
        pieces, end = [], 0
        for start, stop in spans:
            pieces += [text[end:start], f"[{kind}]"]
            end = stop
            self.counts[kind] += 1
        return "".join([*pieces, text[end:]]) if pieces else text


def iban_spans(text: str) -> Iterator[tuple[int, int]]:
    """Where IBANs stand: a country, its length, and check digits that leave 1 modulo 97; spaces between are allowed."""
    end = 0
    for match in _IBAN_START.finditer(text):
        length = _LENGTH_OF.get(match[0][:2].upper())
        if length is None or match.start() < end:
            continue
        stop, characters = _take(text, match.start(), length, lambda letter: letter.isascii() and letter.isalnum())
        if len(characters) == length and not text[stop : stop + 1].isalnum() and is_iban(characters):
            yield match.start(), stop
            end = stop


def is_iban(characters: str) -> bool:
    """Whether letters and digits without spaces are an IBAN by their check digits."""
    moved = characters[4:] + characters[:4]
    return int("".join(str(int(letter, 36)) for letter in moved)) % 97 == 1


def card_spans(text: str) -> Iterator[tuple[int, int]]:
    """Where card numbers stand: 13 to 19 digits, in groups or not, that pass the Luhn test."""
    for run in _DIGIT_RUN.finditer(text):
        groups = [(run.start() + part.start(), run.start() + part.end()) for part in re.finditer(r"\d+", run[0])]
        first = 0
        while first < len(groups):
            last = _card_end(text, groups, first)
            if last is None:
                first += 1
            else:
                yield groups[first][0], groups[last][1]
                first = last + 1


def _card_end(text: str, groups: list[tuple[int, int]], first: int) -> int | None:
    """The last group of the longest card number that begins at group `first`; None where none does."""
    digits, found = "", None
    if text[groups[first][0]] not in _CARD_STARTS:
        return None
    for last in range(first, len(groups)):
        digits += text[slice(*groups[last])]
        if len(digits) > _MAX_CARD:
            break
        if len(digits) >= _MIN_CARD and passes_luhn(digits):
            found = last
    return found


def passes_luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others."""
    numbers = [int(digit) for digit in reversed(digits)]
    doubled = [sum(divmod(2 * number, 10)) for number in numbers[1::2]]
    return any(numbers) and (sum(numbers[::2]) + sum(doubled)) % 10 == 0


def phone_spans(text: str) -> Iterator[tuple[int, int]]:
    """Where phone numbers stand: nine to fifteen digits, fewer behind a `+` or written like 555-0134; no dates."""
    for run in _DIGIT_RUN.finditer(text):
        start, stop = run.span()
        date = _DATE.match(text, start)
        if date:
            start = date.end()
        found = text[start:stop]
        n_digits = sum(letter.isdigit() for letter in found)
        enough = 7 if found.startswith("+") else _MIN_PHONE
        if enough <= n_digits <= _MAX_PHONE or _SHORT_PHONE.fullmatch(found):
            lead = len(found) - len(found.lstrip(" \t.-–—/)" + _INVISIBLE))
            yield start + lead, stop


def _take(text: str, start: int, n: int, belongs: Callable[[str], bool]) -> tuple[int, str]:
    """The first `n` characters that belong, with at most one space or hyphen between two; where they end."""
    taken: list[str] = []
    position, gap = start, 0
    while position < len(text) and len(taken) < n:
        letter = text[position]
        if belongs(letter):
            taken.append(letter)
            gap = 0
        elif letter in " -\u00a0\u202f" and gap == 0:
            gap = 1
        else:
            break
        position += 1
    return position, "".join(taken)
