"""Pooling: from the vectors of a text's tokens to the one vector of the text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common.config import UserError
from common.model_files import read_side_file

if TYPE_CHECKING:
    import torch

Pooling = Literal["cls", "mean", "last", "pooler"]

# What sentence-transformers calls the two that it shares with this suite.
_MODES: dict[str, Pooling] = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}


def read_pooling(model: str | Path, *, revision: str | None = None) -> Pooling:
    """How the model wants its token vectors pooled, from its sentence-transformers file; CLS where there is none.

    Raises UserError for a way of pooling that is not supported.
    """
    settings = read_side_file(str(model), "1_Pooling/config.json", revision=revision)
    if settings is None:
        return "cls"
    chosen = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True]
    by_name: dict[Any, Pooling] = {"cls": "cls", "mean": "mean"}
    if not chosen and settings.get("pooling_mode") in by_name:  # newer files name the mode instead of ticking it
        return by_name[settings["pooling_mode"]]
    if len(chosen) != 1 or chosen[0] not in _MODES:
        raise UserError(
            f"model {model} pools by {chosen or settings}, which is not supported; set pooling: mean or cls"
        )
    return _MODES[chosen[0]]


def pool(hidden: torch.Tensor, mask: torch.Tensor | None, pooling: Pooling) -> torch.Tensor:
    """Pool token vectors `hidden` [b, t, d] to text vectors [b, d] in float32; `mask` [b, t] is 1 for real tokens.

    `mask` may be None where nothing is padded. "pooler" is not made of token vectors and does not belong here.
    """
    if pooling == "cls":
        return hidden[:, 0].float()
    if pooling == "last":  # for causal models, whose last token alone has seen the whole text
        return (hidden[:, -1] if mask is None else hidden[range(len(hidden)), mask.sum(dim=1) - 1]).float()
    hidden = hidden.float()
    if mask is None:
        return hidden.mean(dim=1)
    weights = mask.to(hidden.dtype).unsqueeze(-1)  # [b, t, 1]
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)


def pool_output(output: Any, mask: torch.Tensor | None, pooling: Pooling) -> torch.Tensor:
    """The text vectors [b, d] float32 of what a model without a head returned."""
    if pooling == "pooler":
        return output.pooler_output.float()  # type: ignore[no-any-return]
    return pool(output.last_hidden_state, mask, pooling)
