"""Texts and pictures from anywhere made fit for a page: escaped, cut, control characters visible."""

from __future__ import annotations

import base64
import html
import re

# C0 and C1 controls but tab and line feed, and lone surrogates, which no UTF-8 file can hold.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def safe_text(text: object) -> str:
    """Return text in which control characters are visible (NUL as ␀) and lone surrogates are replaced."""
    return _CONTROLS.sub(_visible, str(text))


def escape(text: object) -> str:
    """Return text as HTML shows it, within an element or a quoted attribute."""
    return html.escape(safe_text(text), quote=True)


def clip_text(text: object, *, n_chars: int = 300) -> str:
    """Return text on one line, cut after n_chars characters, with the number of characters of the whole."""
    whole = str(text)
    n_read = 2 * n_chars + 1000  # enough to fill n_chars unless it is nearly all space
    shown = " ".join(safe_text(whole[:n_read]).split())
    if len(shown) <= n_chars and len(whole) <= n_read:
        return shown
    return f"{shown[:n_chars].rstrip()}… ({len(whole):,} characters)"


def image_url(image: bytes) -> str:
    """Return the data URL of a PNG, JPEG, GIF or WebP picture. Raises ValueError for other bytes."""
    kinds = {b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}
    kind = next((kind for start, kind in kinds.items() if image.startswith(start)), None)
    if kind is None:
        raise ValueError("not a PNG, JPEG, GIF or WebP picture")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"


def _visible(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)  # the block of pictures for control characters
    return "\u2421" if code == 0x7F else "\ufffd"
