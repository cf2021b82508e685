"""Section `llm`: which model, where it is, how hard it may be asked and what it may cost."""

from __future__ import annotations

from common.config import Section


class LlmSettings(Section):
    """Keys of the section `llm` (provider, model, url, limits, budget, cache): filled in by the next commit."""
