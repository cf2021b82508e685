"""The network of both tasks: one encoder, its pooled vector, and a linear head on that.

The head reads the vector that SupCon shapes, before it is normalised. What the architecture has as a head of its own is
carried along untrained; metric_parts.own_head fits it to answer alike, for programs that know nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from common.encoder import batches_by_length
from common.pooled_head import PooledHead
from common.pooling import Pooling, pool_output

# On a CPU the rows of a batch go through the network in pieces of equal length or nearly so: a batch that is made by
# class has long and short texts, and more than half of it would be padding.
_ROWS_OF_A_PIECE = 16


@dataclass(frozen=True)
class Tokens:
    """Texts as token numbers, cut to the longest length that is read."""

    ids: list[np.ndarray]  # each [t] int32
    n_truncated: int


@dataclass(frozen=True)
class Encoded:
    """What the network makes of many texts in evaluation mode."""

    vectors: np.ndarray  # [n, d] float32, un-normalised
    logits: np.ndarray  # [n, c] float32


class JointModel:
    """Encoder and head on one device; metric_parts.pretrained makes one."""

    def __init__(
        self,
        network: Any,
        head: torch.nn.Linear,
        tokenizer: Any,
        *,
        pooling: Pooling,
        device: str,
        dtype: str,
        max_length: int,
        has_new_head: bool,
    ) -> None:
        self.network = network  # the encoder, and the architecture's own head, which is not trained
        dropout = torch.nn.Dropout(_head_dropout(network.config))
        self.trained = torch.nn.ModuleDict({"encoder": network.base_model, "dropout": dropout, "head": head})
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.device = device
        self.dtype = dtype
        self.max_length = max_length
        self.has_new_head = has_new_head  # made here from random numbers, not read from the checkpoint

    @property
    def head(self) -> torch.nn.Linear:
        """The head on the pooled vector."""
        return self.trained["head"]  # type: ignore[return-value]

    @property
    def padding(self) -> int:
        """The token number that fills up short texts."""
        return int(self.tokenizer.pad_token_id or 0)

    def pooled_head(self) -> PooledHead:
        """The head as it is saved."""
        weight, bias = (values.detach().cpu().numpy() for values in (self.head.weight, self.head.bias))
        return PooledHead(weight, bias, self.pooling)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Token numbers of texts; those that were cut are counted."""
        ids: list[np.ndarray] = []
        n_truncated = 0
        for start in range(0, len(texts), 4096):
            encoding = self.tokenizer(
                list(texts[start : start + 4096]),
                truncation=True,
                max_length=self.max_length,
                return_attention_mask=False,
                return_token_type_ids=False,
            )
            ids += [np.asarray(row, np.int32) for row in encoding["input_ids"]]
            n_truncated += sum(bool(fast.overflowing) for fast in encoding.encodings or ())
        return Tokens(ids, n_truncated)

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors [b, d] (un-normalised) and logits [b, c] of a padded batch, both float32."""
        lengths = batch["attention_mask"].sum(dim=1)
        size = _ROWS_OF_A_PIECE if self.device == "cpu" else len(lengths)
        if len(lengths) <= size:
            return self._forward_piece(batch)
        order = torch.argsort(lengths, stable=True)
        pieces = []
        for rows in torch.split(order, size):
            width = int(lengths[rows].max())
            pieces.append(self._forward_piece({name: values[rows, :width] for name, values in batch.items()}))
        back = torch.argsort(order)
        return torch.cat([piece[0] for piece in pieces])[back], torch.cat([piece[1] for piece in pieces])[back]

    def _forward_piece(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = {name: values.to(self.device) for name, values in batch.items()}
        with self.autocast():
            output = self.network.base_model(**inputs)
        vectors = pool_output(output, inputs["attention_mask"], self.pooling)
        return vectors, self.head(self.trained["dropout"](vectors))

    def encode(self, tokens: Tokens, *, rows: np.ndarray | None = None, batch_size: int = 128) -> Encoded:
        """Encode texts in evaluation mode; the mode and the random numbers of training are left as they were."""
        chosen = np.arange(len(tokens.ids)) if rows is None else rows
        vectors = np.empty((len(chosen), self.network.config.hidden_size), np.float32)
        logits = np.empty((len(chosen), self.head.out_features), np.float32)
        was_training = self.trained.training
        self.trained.eval()
        with torch.no_grad():
            for places in batches_by_length([len(tokens.ids[row]) for row in chosen], batch_size):
                out = self.forward(pad_rows([tokens.ids[chosen[place]] for place in places], padding=self.padding))
                vectors[places], logits[places] = out[0].cpu().numpy(), out[1].cpu().numpy()
        self.trained.train(was_training)
        return Encoded(vectors, logits)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the encoder; head and losses are float32."""
        dtype = getattr(torch, self.dtype)
        return torch.autocast(device_type=self.device.split(":")[0], dtype=dtype, enabled=self.dtype != "float32")


def pad_rows(ids: Sequence[np.ndarray], *, padding: int) -> dict[str, torch.Tensor]:
    """Token numbers of some texts as one batch: `input_ids` and `attention_mask`, [b, t] int64."""
    width = max(len(row) for row in ids)
    padded = np.full((len(ids), width), padding, np.int64)
    mask = np.zeros((len(ids), width), np.int64)
    for index, row in enumerate(ids):
        padded[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return {"input_ids": torch.from_numpy(padded), "attention_mask": torch.from_numpy(mask)}


def _head_dropout(config: Any) -> float:
    """What the architecture would drop before its own head."""
    names = ("classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob")
    return next((float(value) for name in names if (value := getattr(config, name, None)) is not None), 0.1)
