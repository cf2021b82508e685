"""Write the demonstration dataset: invented support requests of a bank, a phone company and an online shop.

    python demo/support_requests.py --out runs/demo/requests.parquet [--rows 5000] [--seed 7] [--overwrite]

Reads nothing; writes one parquet file with request_id, text, label, teacher_label, true_intent, language, created_at
and channel. Thirty intents in English (70%) and Russian, some of them easily confused; a tenth of the rows has a gold
`label`, every row a `teacher_label` that is right about 85 times in 100. A few texts are null, empty, repeated,
100,000 characters long or hold markup. `true_intent` is for evaluation only. Equal rows and seed give equal bytes.
"""

from __future__ import annotations

import io
import random
import sys
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a script, this folder is on the path and its parent is not
    sys.path.insert(0, str(ROOT))

from common.config import UserError  # noqa: E402
from demo.command import write_by_command  # noqa: E402
from demo.intents import INTENTS, neighbours_of  # noqa: E402
from demo.writer import FIRST_DAY, N_DAYS, MessageWriter  # noqa: E402

if TYPE_CHECKING:
    import pyarrow as pa

SHARE_ENGLISH = 0.70
SHARE_LABELLED = 0.10
TEACHER_ACCURACY = 0.85
TEACHER_NEAR_MISS = 0.75  # of the teacher's mistakes, those that name a confusable intent
SHARE_DUPLICATE = 0.015
LONG_TEXT_CHARS = 100_000
CHANNELS = {"chat": 0.36, "email": 0.26, "app": 0.22, "phone": 0.10, "social": 0.06}


def generate_requests(n_rows: int = 5000, seed: int = 7) -> pa.Table:
    """Return n_rows invented requests as an arrow table; equal arguments give equal rows. Raises UserError below 1."""
    import pyarrow as pa

    if n_rows < 1:
        raise UserError(f"--rows is {n_rows}; give 1 or more")
    dice = random.Random(seed)
    rows = [_draw_row(dice) for _ in range(n_rows)]
    _repeat_some(rows, dice)
    _add_odd_texts(rows, dice)
    _add_labels(rows, dice)
    times = sorted(_draw_time(dice) for _ in rows)
    for i, (row, time) in enumerate(zip(rows, times, strict=True)):
        row.update(request_id=f"REQ-{i + 1:06d}", created_at=time)
    fields = [
        ("request_id", pa.string()),
        ("text", pa.string()),
        ("label", pa.string()),
        ("teacher_label", pa.string()),
        ("true_intent", pa.string()),
        ("language", pa.string()),
        ("created_at", pa.timestamp("ms", tz="UTC")),
        ("channel", pa.string()),
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema(fields))


# --- the whole set ---------------------------------------------------------------------------------------------------


def _draw_row(dice: random.Random) -> dict[str, Any]:
    intent = dice.choices(INTENTS, weights=[intent.weight for intent in INTENTS])[0]
    language = "en" if dice.random() < SHARE_ENGLISH else "ru"
    channel = dice.choices(list(CHANNELS), weights=list(CHANNELS.values()))[0]
    text = MessageWriter(language, dice).write(intent, channel)
    return {"text": text, "true_intent": intent.name, "language": language, "channel": channel}


def _repeat_some(rows: list[dict[str, Any]], dice: random.Random) -> None:
    """Let some customers send an earlier message again, word for word."""
    for _ in range(int(SHARE_DUPLICATE * len(rows))):
        first, second = dice.randrange(len(rows)), dice.randrange(len(rows))
        rows[second] = dict(rows[first])


def _add_odd_texts(rows: list[dict[str, Any]], dice: random.Random) -> None:
    """Replace a few texts of a set of 100 rows or more by what real exports hold: nothing, too much, markup."""
    if len(rows) < 100:
        return
    n_each = max(1, len(rows) // 1000)
    places = dice.sample(range(len(rows)), 4 * n_each + 5)
    for place in places[:n_each]:
        rows[place]["text"] = None
    for place in places[n_each : 2 * n_each]:
        rows[place]["text"] = ""
    for place in places[2 * n_each : 3 * n_each]:
        rows[place]["text"] = dice.choice((" ", "\n\n", "\t", "   "))
    for place in places[3 * n_each : 3 * n_each + 3]:
        rows[place]["text"] = _long_thread(rows[place]["text"], rows, dice)
    markup = (
        "<div><p>{}</p><script>document.title = 'script ran'</script></div>",
        "\u202e{}\u202c \u200f",
        "{} \x00 [sent from my phone] 👩‍👩‍👧 🇬🇧",
    )
    for place, pattern in zip(places[3 * n_each + 3 :], markup, strict=False):
        rows[place]["text"] = pattern.format(rows[place]["text"])


def _long_thread(text: str, rows: Sequence[dict[str, Any]], dice: random.Random) -> str:
    """Return text with a mail thread quoted below it, LONG_TEXT_CHARS characters in all."""
    parts, n_chars = [text], len(text)
    while n_chars < LONG_TEXT_CHARS:
        quoted = "\n> " + (dice.choice(rows)["text"] or "")[:2000].replace("\n", "\n> ")
        parts.append(quoted)
        n_chars += len(quoted)
    return "".join(parts)[:LONG_TEXT_CHARS]


def _add_labels(rows: list[dict[str, Any]], dice: random.Random) -> None:
    """Give every row the teacher's opinion, and a tenth of the readable rows of each intent their gold label."""
    names = [intent.name for intent in INTENTS]
    readable: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for row in rows:
        truth = row["true_intent"]
        row["label"] = None
        row["teacher_label"] = truth
        if dice.random() > TEACHER_ACCURACY:
            is_near = dice.random() < TEACHER_NEAR_MISS
            others = neighbours_of(truth) if is_near else [name for name in names if name != truth]
            row["teacher_label"] = dice.choice(others)
        if (row["text"] or "").strip():
            readable[truth].append(row)
    for members in readable.values():
        n_labelled = min(len(members), max(1, round(SHARE_LABELLED * len(members))))
        for row in dice.sample(members, n_labelled):
            row["label"] = row["true_intent"]


def _draw_time(dice: random.Random) -> datetime:
    """Return a moment in the twelve weeks, most often in the working hours of a weekday."""
    while True:
        day = FIRST_DAY + timedelta(days=dice.randrange(N_DAYS))
        if day.weekday() < 5 or dice.random() < 0.45:
            break
    hour = min(23.99, max(0.0, dice.gauss(13.5, 4.0)))
    return day + timedelta(milliseconds=int(hour * 3_600_000))


# --- the file --------------------------------------------------------------------------------------------------------


def to_parquet(table: pa.Table) -> bytes:
    """Return the table as the bytes of a parquet file."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=8192)
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse arguments, write the file, print its path; return the exit code."""
    return write_by_command(
        lambda rows, seed: to_parquet(generate_requests(rows, seed)),
        what="support requests as a parquet file",
        default_rows=5000,
        arguments=arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
