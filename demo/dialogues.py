"""Write the demonstration of mode clio: invented dialogues between customers and an assistant, as JSON lines.

    python demo/dialogues.py --out runs/demo/dialogues.jsonl [--rows 600] [--seed 7] [--overwrite]

Reads nothing; writes conversation_id, user_id, language, true_intent (for evaluation only) and messages
[{role, content}]. The intents are those of demo/support_requests.py. Some customers give mail addresses, phone, card
and account numbers, all of them made up, for masking to find. A few dialogues are empty, very long, of one message, of
an unknown role, or hold markup. Equal rows and seed give equal bytes.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a script, this folder is on the path and its parent is not
    sys.path.insert(0, str(ROOT))

from common.config import UserError  # noqa: E402
from demo.command import write_by_command  # noqa: E402
from demo.intents import INTENTS, Intent  # noqa: E402
from demo.writer import MessageWriter  # noqa: E402

Row = dict[str, Any]

SHARE_ENGLISH = 0.85
SHARE_WITH_CONTACT = 0.25
N_ODD = 5  # of a hundred dialogues or more

ASKS = {
    "en": (
        "Could you tell me a little more?",
        "I am sorry to hear that. How may I reach you?",
        "Since when is that so?",
    ),
    "ru": ("Расскажите, пожалуйста, подробнее.", "Мне жаль. Как с вами связаться?", "Давно это так?"),
}
ANSWERS = {
    "en": ("I have looked into it and passed it on.", "Done. You will hear from us within two days.", "It is settled."),
    "ru": ("Я всё проверил и передал дальше.", "Готово. Мы ответим в течение двух дней.", "Всё решено."),
}
THANKS = {"en": ("Thank you!", "ok thanks", "Finally."), "ru": ("Спасибо!", "ок, спасибо", "Наконец-то.")}
CONTACTS = {
    "en": ("My mail is {mail}.", "Call me on {phone}.", "The card is {card}.", "My account is {iban}."),
    "ru": ("Моя почта {mail}.", "Позвоните мне: {phone}.", "Номер карты {card}.", "Мой счёт {iban}."),
}


def generate_dialogues(n_rows: int = 600, seed: int = 7) -> list[Row]:
    """Return n_rows invented dialogues; equal arguments give equal rows. Raises UserError below 1."""
    if n_rows < 1:
        raise UserError(f"--rows is {n_rows}; give 1 or more")
    dice = random.Random(seed)
    n_users = max(1, n_rows * 2 // 3)
    rows = []
    for number in range(n_rows):
        intent = dice.choices(INTENTS, weights=[intent.weight for intent in INTENTS])[0]
        language = "en" if dice.random() < SHARE_ENGLISH else "ru"
        rows.append(
            {
                "conversation_id": f"D-{number + 1:05d}",
                "user_id": f"U-{dice.randrange(n_users):05d}",
                "language": language,
                "true_intent": intent.name,
                "messages": _messages(intent, language, dice),
            }
        )
    _make_some_odd(rows, dice)
    return rows


def _messages(intent: Intent, language: str, dice: random.Random) -> list[dict[str, str]]:
    writer = MessageWriter(language, dice)
    said = [("user", writer.write(intent, "chat")), ("assistant", dice.choice(ASKS[language]))]
    more = [writer.write(intent, "chat")] if dice.random() < 0.6 else []
    if dice.random() < SHARE_WITH_CONTACT:
        more.append(dice.choice(CONTACTS[language]).format(**_contacts(dice)))
    if more:
        said.append(("user", " ".join(more)))
    said.append(("assistant", dice.choice(ANSWERS[language])))
    if dice.random() < 0.4:
        said.append(("user", dice.choice(THANKS[language])))
    return [{"role": role, "content": content} for role, content in said]


def _contacts(dice: random.Random) -> dict[str, str]:
    """Contacts that nobody has: a reserved domain, fictional phones, and the card and IBAN that manuals print."""
    return {
        "mail": f"customer{dice.randrange(1000)}@example.com",
        "phone": f"+1 202 555 01{dice.randrange(100):02d}",
        "card": "4111 1111 1111 1111",
        "iban": "DE89 3704 0044 0532 0130 00",
    }


def _make_some_odd(rows: list[Row], dice: random.Random) -> None:
    """Put what real exports hold in the place of a few dialogues of a set of 100 or more."""
    if len(rows) < 100:
        return
    empty, short, foreign, long, markup = (rows[place] for place in dice.sample(range(len(rows)), N_ODD))
    empty["messages"] = []
    short["messages"] = short["messages"][:1]
    foreign["messages"].insert(1, {"role": "narrator", "content": "The customer waits."})
    long["messages"][0]["content"] = " ".join([long["messages"][0]["content"]] * 400)
    markup["messages"][0]["content"] += " <script>document.title = 'script ran'</script></dialogue>"


def to_json_lines(rows: Sequence[Row]) -> bytes:
    """One JSON object a line, as UTF-8."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse arguments, write the file, print its path; return the exit code."""
    return write_by_command(
        lambda rows, seed: to_json_lines(generate_dialogues(rows, seed)),
        what="dialogues as JSON lines",
        default_rows=600,
        arguments=arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
