"""Words and sentences of a text: stems, keywords, and a name made of them. Knows English and Russian best."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?…。！？])\s+|\n+")
_STEM_CHARS = 6  # of a word, enough to hold an inflected form to its family

# Words that say nothing of what a request is about: English, then Russian.
_COMMON_WORDS = """
a about after again all also am an and any are as at be because been before being but by can could did do does doing
don't for from get getting give got had has have having he hello her here hi him his how i i'd i'll i'm i've if in into
is isn't it it's its just know let like make many may me might more most much must my need no not now of off on once
one only or other our out over please really same she should show so some still such tell than thank thanks that that's
the their them then there these they this those through to too try trying under until up us use very want was way we
well were what what's when where which while who whom why will with won't would yes you your
а без был была были было быть в вам вас ваш весь во вот все всё вы где да для до его ее её если есть еще ещё же за
здравствуйте и из или им их к как какая какие какой когда кто ли либо меня мне могу мой моя мы на над надо нам нас наш
не нет ни но ну нужно о об он она они оно от очень по под пожалуйста почему при привет про с сам сейчас со спасибо так
также там те тем то тоже того только том ты у уже хочу чем что чтобы это этот эта эти этого я добрый день скажите
подскажите можно
"""
_STOP_WORDS = frozenset(_COMMON_WORDS.split())


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, in their order, without the ones that every text has."""
    found = (word.lower().replace("’", "'") for word in _WORD.findall(text))
    return [word for word in found if word not in _STOP_WORDS and len(word) > 1]


def stem(word: str) -> str:
    """The beginning of a word, by which its forms are one."""
    return word[:_STEM_CHARS]


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, in their order."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def keywords(texts: Sequence[str], *, others: Sequence[str] = (), n_words: int = 4) -> list[str]:
    """The words that most of `texts` share and few of `others` have, the most telling first.

    The score of a stem is the share of texts that hold it times the logarithm of how much rarer it is outside.
    """
    inside, forms = _shares(texts)
    outside, _ = _shares(others)
    scores = {token: share * math.log(1 + share / (outside.get(token, 0.0) + 0.05)) for token, share in inside.items()}
    best = sorted(scores, key=lambda token: (-scores[token], token))[:n_words]
    return [forms[token] for token in best]


def name_from(texts: Sequence[str], *, others: Sequence[str] = (), n_words: int = 4) -> str:
    """A name of a few keywords in the order in which the texts use them; the first words where there are none."""
    found = keywords(texts, others=others, n_words=n_words)
    if not found:
        return " ".join(" ".join(texts).split()[:n_words]) or "unnamed"
    places = {word: _mean_place(stem(word), texts) for word in found}
    name = " ".join(sorted(found, key=lambda word: (places[word], word)))
    return name[:1].upper() + name[1:]


def clip(text: str, n_chars: int) -> str:
    """A text cut at a word's end to at most `n_chars` characters."""
    line = " ".join(text.split())
    if len(line) <= n_chars:
        return line
    return line[: n_chars - 1].rsplit(" ", 1)[0] + "…"


def _shares(texts: Sequence[str]) -> tuple[dict[str, float], dict[str, str]]:
    """The share of texts that hold each stem, and the commonest form of each."""
    counts: Counter[str] = Counter()
    forms: dict[str, Counter[str]] = {}
    for text in texts:
        present = {(stem(word), word) for word in words_of(text)}
        counts.update({token for token, _ in present})
        for token, word in present:
            forms.setdefault(token, Counter())[word] += 1
    shares = {token: count / len(texts) for token, count in counts.items()}
    return shares, {token: min(seen, key=lambda word: (-seen[word], word)) for token, seen in forms.items()}


def _mean_place(token: str, texts: Sequence[str]) -> float:
    places = [place for text in texts for place in _places(token, text)]
    return sum(places) / len(places) if places else 1.0


def _places(token: str, text: str) -> Iterator[float]:
    words = words_of(text)
    for index, word in enumerate(words):
        if stem(word) == token:
            yield index / len(words)
            return
