"""A small set of invented requests with known intents, in two languages, for the tests of llm_cluster."""

from __future__ import annotations

import pandas as pd

INTENTS = {
    "card_arrival": "where is my new card, it has not arrived",
    "card_lost": "I lost my card, please block it",
    "pin_forgotten": "I forgot the PIN of my card",
    "login_trouble": "cannot log in to the app",
    "refund_missing": "my refund from the shop is missing",
    "transfer_pending": "a transfer is still pending",
    "exchange_rate": "the exchange rate you used is wrong",
    "cash_declined": "the cash machine declined my withdrawal",
    "close_account": "please close my account",
    "address_change": "I moved and want to change my address",
    "вход_в_приложение": "не могу войти в приложение банка",
    "потеря_карты": "я потерял карту, заблокируйте её",
}
OPENINGS = ("Hello,", "Hi there!", "Good morning:", "Please help.", "Urgent!", "Question:", "Again,", "So,")
ENDINGS = ("thanks", "what can I do?", "it is the second time", "since Monday", "", "please answer", "am I right?")


def requests_frame(n_rows: int = 120, *, n_intents: int = len(INTENTS)) -> pd.DataFrame:
    """`n_rows` different texts with request_id and label, the intents taking turns."""
    names = list(INTENTS)[:n_intents]
    rows = []
    for i in range(n_rows):
        label = names[i % n_intents]
        turn = i // n_intents
        text = f"{OPENINGS[turn % len(OPENINGS)]} {INTENTS[label]} {ENDINGS[turn % len(ENDINGS)]} ({turn})".strip()
        rows.append({"request_id": f"R{i:04d}", "text": text, "label": label})
    return pd.DataFrame(rows)


def labels_by_text(frame: pd.DataFrame) -> dict[str, str]:
    """What a TruthBrain knows."""
    return dict(zip(frame["text"], frame["label"], strict=True))
