"""A Hugging Face text encoder: texts in, one vector a text out, in the order of the input.

Texts are tokenised ahead in batches and grouped by their number of tokens, so that next to nothing is spent on padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from common.checkpoint import Head, load_checkpoint, load_tokenizer, longest_input
from common.model_files import resolve_model
from common.pooled_head import PooledHead
from common.pooling import Pooling, pool_output, read_pooling

if TYPE_CHECKING:
    import torch

# A text is cut to this many characters a token before it is tokenised: a tokenizer reads all of a book to keep a page.
_MAX_CHARACTERS_A_TOKEN = 100

# On a CPU no more tokens than this go through the model at once: what the layers pass on then stays in the cache.
# Measured with MiniLM on one core: 2,000 tokens at a time take a fifth more time, 10,000 two thirds.
_CPU_TOKENS_AT_ONCE = 768


@dataclass(frozen=True)
class Encoded:
    """What an encoder makes of some texts."""

    vectors: np.ndarray  # [n, d] float32
    probs: np.ndarray | None  # [n, c] float32, rows sum to 1; None where the model has no classification head
    truncated: np.ndarray  # [n] bool: the text was longer than the model reads


@lru_cache(maxsize=2)
def load_encoder(
    model_name_or_path: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    pooling: Literal["auto", "cls", "mean", "pooler"] = "auto",
    head: Head = "none",
    revision: str | None = None,
    max_length: int | None = None,
) -> TextEncoder:
    """Load a model once a process.

    `head`: "classifier" demands a classification head in the checkpoint, "auto" takes it if it is there.
    `max_length` is in tokens; None takes the model's own.

    Raises UserError where the folder is no model, has no tokenizer, or lacks the weights that are asked for.
    """
    import torch

    resolved = resolve_model(model_name_or_path)
    tokenizer = load_tokenizer(resolved, revision=revision)
    chosen = read_pooling(resolved, revision=revision) if pooling == "auto" else pooling
    checkpoint = load_checkpoint(resolved, pooling=chosen, head=head, revision=revision)
    longest = longest_input(resolved, checkpoint.model.config, tokenizer, revision=revision)
    return TextEncoder(
        checkpoint.model.to(device=device, dtype=getattr(torch, dtype)).eval(),
        tokenizer,
        device=device,
        pooling=chosen,
        max_length=min(max_length or longest, longest),
        classes=checkpoint.classes,
        head=checkpoint.head,
    )


class TextEncoder:
    """A loaded model and its tokenizer; make one with `load_encoder`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        device: str,
        pooling: Pooling,
        max_length: int,
        classes: list[str] | None = None,
        head: PooledHead | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.device = device
        self.pooling = pooling
        self.max_length = max_length
        self.classes = classes  # names in the order of `probs`; None where there is no head
        self.head = head  # on the pooled vector; None where the architecture's own is used, or none
        self._has_own_head = classes is not None and head is None
        self._base_output: Any = None
        if self._has_own_head:
            model.base_model.register_forward_hook(self._keep_base_output)

    @property
    def dimension(self) -> int:
        """Length of a text's vector."""
        return int(self.model.config.hidden_size)

    def encode(
        self, texts: Sequence[str], *, batch_size: int = 128, on_progress: Callable[[int], None] | None = None
    ) -> Encoded:
        """Encode texts; `batch_size` texts go through the model at once (on a CPU fewer long ones), the longest first.

        `on_progress` is called with the number of texts that were just done.
        """
        import torch

        token_ids, truncated = self._tokenize(texts)
        vectors = np.empty((len(texts), self.dimension), np.float32)
        probs = np.empty((len(texts), len(self.classes)), np.float32) if self.classes is not None else None
        max_tokens = _CPU_TOKENS_AT_ONCE if self.device == "cpu" else None
        with torch.inference_mode():
            for rows in batches_by_length([len(ids) for ids in token_ids], batch_size, max_tokens=max_tokens):
                batch_vectors, batch_probs = self._forward([token_ids[row] for row in rows])
                vectors[rows] = batch_vectors
                if probs is not None:
                    probs[rows] = batch_probs
                if on_progress:
                    on_progress(len(rows))
        return Encoded(vectors, probs, truncated)

    def _tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], np.ndarray]:
        longest = self.max_length * _MAX_CHARACTERS_A_TOKEN
        truncated = np.array([len(text) > longest for text in texts], bool)
        token_ids: list[list[int]] = []
        for start in range(0, len(texts), 4096):
            encoding = self.tokenizer(
                [text[:longest] for text in texts[start : start + 4096]],
                truncation=True,
                max_length=self.max_length,
                return_attention_mask=False,
                return_token_type_ids=False,
            )
            token_ids += encoding["input_ids"]
            for offset, fast in enumerate(encoding.encodings or ()):
                truncated[start + offset] |= bool(fast.overflowing)
        if not self.tokenizer.is_fast:
            truncated |= np.array([len(ids) >= self.max_length for ids in token_ids], bool)
        return token_ids, truncated

    def _forward(self, token_ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray | None]:
        import torch

        ids, mask = self._pad(token_ids)
        arguments = {"input_ids": ids.to(self.device)}
        if mask is not None:
            mask = arguments["attention_mask"] = mask.to(self.device)
        output = self.model(**arguments)
        base_output = self._base_output if self._has_own_head else output
        vectors = pool_output(base_output, mask, self.pooling)
        if self.classes is None:
            return vectors.cpu().numpy(), None
        logits = output.logits.float() if self.head is None else self._pooled_logits(base_output, mask, self.head)
        return vectors.cpu().numpy(), torch.softmax(logits, dim=-1).cpu().numpy()

    def _pooled_logits(self, base_output: Any, mask: torch.Tensor | None, head: PooledHead) -> torch.Tensor:
        """Logits [b, c] float32 of the vectors that the head was trained on, however those of the caller are pooled."""
        import torch

        vectors = pool_output(base_output, mask, cast(Pooling, head.pooling))
        weight, bias = (torch.from_numpy(values).to(vectors.device) for values in (head.weight, head.bias))
        return torch.nn.functional.linear(vectors, weight, bias)

    def _pad(self, token_ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        import torch

        lengths = [len(ids) for ids in token_ids]
        width = max(lengths)
        padding = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [padding] * (width - len(row)) for row in token_ids])  # [b, t]
        if min(lengths) == width:
            return ids, None
        return ids, (torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]).long()

    def _keep_base_output(self, module: Any, arguments: Any, output: Any) -> None:
        self._base_output = output


def batches_by_length(
    lengths: Sequence[int], batch_size: int, *, max_tokens: int | None = None
) -> Iterator[np.ndarray]:
    """Yield row numbers in batches of nearly equal length, the longest first; equal lengths keep their order.

    A batch has at most `batch_size` rows and, padded, `max_tokens` tokens, but at least one row.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    start = 0
    while start < len(order):
        n_rows = batch_size
        if max_tokens is not None:
            n_rows = min(batch_size, max(1, max_tokens // max(1, lengths[order[start]])))
        yield order[start : start + n_rows]
        start += n_rows
