"""One message of one customer: sentences from templates, in the manner of the channel it came by."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from types import ModuleType

from demo import english, russian
from demo.intents import Intent, neighbours_of
from demo.noise import misspell, strip_punctuation

FIRST_DAY = datetime(2026, 1, 5, tzinfo=UTC)
N_DAYS = 84
SHARE_VAGUE = 0.03  # messages that say no more than their topic
SHARE_MIXED = 0.06  # messages that touch on a confusable intent as well
LANGUAGES: dict[str, ModuleType] = {"en": english, "ru": russian}
MONTHS = ("January", "February", "March", "April")  # those of the twelve weeks
LASTING_SLOTS = ("order", "product", "product_n", "phone", "name", "digits", "plan", "city")  # the same in a message

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")


class MessageWriter:
    """A customer who writes one message in one language; what they speak of (an order, a city) stays the same."""

    def __init__(self, language: str, dice: random.Random) -> None:
        self.words = LANGUAGES[language]
        self.is_english = language == "en"
        self.dice = dice
        self._said: dict[str, str] = {}

    def write(self, intent: Intent, channel: str) -> str:
        """Return greeting, context, the matter, a question and a closing, each if the dice say so."""
        is_letter = channel == "email"
        sentences = []
        if self._happens(0.85 if is_letter else 0.3):
            sentences.append(self._fill(self.words.GREETINGS) + self.dice.choice((",", "!", ".", "")))
        if self._happens(0.35 if is_letter else 0.12):
            sentences.append(self._sentence(self.words.CONTEXTS[intent.topic]))
        sentences.extend(self._matter(intent))
        if self._happens(0.4 if is_letter else 0.15):
            sentences.append(self._sentence(self.words.REQUESTS))
        if self._happens(0.75 if is_letter else 0.08):
            sentences.append(self._fill(self.words.CLOSINGS))
        text = ("\n" if is_letter and self._happens(0.5) else " ").join(sentences)
        return self._speak(text) if channel == "phone" else self._type(text, channel)

    def _matter(self, intent: Intent) -> list[str]:
        """Return the sentences that carry the intent: most often one; some are vague, some touch on another."""
        if self._happens(SHARE_VAGUE):
            return [self._sentence(self.words.VAGUE[intent.topic])]
        sentences = [self._sentence(self.words.SENTENCES[intent.name])]
        if self._happens(SHARE_MIXED):
            other = self._sentence(self.words.SENTENCES[self.dice.choice(neighbours_of(intent.name))])
            sentences.append(f"{self.dice.choice(self.words.ASIDES)} {_lower_first(other)}")
        elif self._happens(0.2):
            sentences.append(self._sentence(self.words.SENTENCES[intent.name]))
        return sentences

    def _speak(self, text: str) -> str:
        """Return text as a machine hears it on the phone: lower case, no punctuation, fillers between the words."""
        words = strip_punctuation(text.lower()).split(" ")
        for _ in range(self.dice.randint(1, 3)):
            words.insert(self.dice.randrange(len(words)), self.dice.choice(self.words.FILLERS))
        return " ".join(words)

    def _type(self, text: str, channel: str) -> str:
        """Return text as fingers type it: lower case, shouting, misspelt or with a smiley at the end."""
        if channel == "social" and self._happens(0.6):
            text = f"@support {text}"
        if self._happens(0.1 if channel == "email" else 0.4):
            text = text.lower()
        elif self._happens(0.015):
            text = text.upper()
        if self._happens(0.2):
            text = misspell(text, n_errors=self.dice.choice((1, 1, 2, 3)), dice=self.dice)
        if self._happens(0.3):
            text = text.rstrip(".") + self.dice.choice(("", "", "!", "!!", " :(", "...", " 🙏", " 😡"))
        return text

    # --- templates ---------------------------------------------------------------------------------------------------

    def _sentence(self, templates: Sequence[str]) -> str:
        text = self._fill(templates)
        return text if text[-1] in ".!?" else text + "."

    def _fill(self, templates: Sequence[str]) -> str:
        """Return one template with choices made, slots filled, spaces put right and a capital in front."""
        text = self.dice.choice(templates)
        while "[" in text or "{" in text:
            text = _CHOICE.sub(lambda match: self.dice.choice(match.group(1).split("|")), text)
            text = _SLOT.sub(lambda match: self._slot(match.group(1)), text)
        text = re.sub(r"\s+", " ", text).strip()
        text = re.sub(r"\s+([,.?!])", r"\1", text)
        return text[:1].upper() + text[1:]

    def _slot(self, name: str) -> str:
        if name not in LASTING_SLOTS:
            return self._draw(name)
        if name not in self._said:
            self._said[name] = self._draw(name)
        return self._said[name]

    def _draw(self, name: str) -> str:
        if name in self.words.SLOTS:
            return self.dice.choice(self.words.SLOTS[name])
        if name == "small":
            return str(self.dice.randint(2, 9 if self.is_english else 4))  # Russian plurals change at five
        if name == "digits":
            return f"{self.dice.randint(0, 9999):04d}"
        if name == "order":
            pattern = self.dice.choice(("#{}", "{}", "A-{}", "no. {}" if self.is_english else "№{}"))
            return pattern.format(self.dice.randint(10_000, 999_999))
        if name == "phone":
            return f"{'+44 7' if self.is_english else '+7 9'}{self.dice.randint(0, 999_999_999):09d}"
        return self._amount() if name == "amount" else self._date()

    def _amount(self) -> str:
        value = round(math.exp(self.dice.gauss(3.6, 1.1)), 2)  # around 37, in pounds, euros or dollars
        whole = max(1, int(value))
        forms: tuple[str, ...]
        if self.is_english:
            forms = (
                f"£{value:.2f}",
                f"{whole} pounds",
                f"${whole}",
                f"{whole} EUR",
                f"€{value:.2f}",
                f"{whole} dollars",
            )
        else:
            roubles = max(50, int(value * 10) * 10)
            forms = (f"{roubles} руб", f"{roubles:,} ₽".replace(",", " "), f"{roubles} рублей", f"{roubles}р")
        return self.dice.choice(forms)

    def _date(self) -> str:
        day = FIRST_DAY + timedelta(days=self.dice.randrange(N_DAYS))
        if not self.is_english:
            return self.dice.choice((f"{day:%d.%m}", f"{day:%d.%m.%Y}", f"{day.day}-го числа"))
        month = MONTHS[day.month - 1]
        return self.dice.choice((f"{day:%d/%m}", f"{day.day} {month}", f"{month} {day.day}", f"{day:%Y-%m-%d}"))

    def _happens(self, share: float) -> bool:
        return self.dice.random() < share


def _lower_first(text: str) -> str:
    return text if text.startswith("I ") else text[:1].lower() + text[1:]
