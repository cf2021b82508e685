"""The network of both tasks: one encoder, its pooled vector, and a linear head on that.

The head reads the vector that SupCon shapes, before it is normalised. What the architecture has as a head of its own is
carried along untrained; metric_parts.own_head fits it to answer alike, for programs that know nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from common.backend import choose_dtype
from common.checkpoint import load_tokenizer
from common.config import UserError
from common.encoder import batches_by_length
from common.model_files import find_side_file, resolve_model
from common.pooled_head import POOLED_HEAD, PooledHead, read_pooled_head
from common.pooling import Pooling, pool_output, read_pooling
from metric_parts.settings import TrainerSettings

log = logging.getLogger(__name__)

# On a CPU the rows of a batch go through the network in pieces of equal length or nearly so: a batch that is made by
# class has long and short texts, and more than half of it would be padding.
_ROWS_OF_A_PIECE = 16

_PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16", "auto": "auto"}


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
    """Encoder and head on one device; make one with `load_model`."""

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


# --- Loading ---------------------------------------------------------------------------------------------------------


def load_model(
    source: str,
    *,
    settings: TrainerSettings,
    classes: Sequence[str],
    device: str,
    pooling: Pooling | None = None,
    tokenizer_source: str | None = None,
) -> JointModel:
    """Load a checkpoint for both tasks; its head is kept if it knows the same classes, else one is made from the seed.

    `source` is a `model_name`; `pooling` overrides the settings, for checkpoints of ours, and `tokenizer_source` says
    where the tokenizer comes from if not from `source`.
    Raises UserError where it is no model, has no tokenizer, or lacks weights of the encoder.
    """
    resolved = resolve_model(source)
    dtype = choose_dtype(_PRECISIONS[settings.training.mixed_precision], device=device)
    chosen = pooling or (read_pooling(resolved) if settings.pooling == "auto" else settings.pooling)
    torch.manual_seed(settings.training.seed)
    found = _find_head(resolved, classes, pooling=chosen)
    network = _load_network(resolved, classes, settings.training.attention_implementation, chosen)
    head = _make_head(network.config, found, n_classes=len(classes))
    tokenizer = load_tokenizer(resolve_model(tokenizer_source or source))
    max_length = _longest(settings.training.max_seq_length, network, tokenizer)
    log.info("model %s: pooling %s, %s on %s, at most %d tokens", source, chosen, dtype, device, max_length)
    return JointModel(
        network.to(device),
        head.to(device),
        tokenizer,
        pooling=chosen,
        device=device,
        dtype=dtype,
        max_length=max_length,
        has_new_head=found is None,
    )


def _find_head(resolved: str, classes: Sequence[str], *, pooling: str) -> PooledHead | None:
    """The checkpoint's head on the pooled vector, if it has one of these classes."""
    path = find_side_file(resolved, POOLED_HEAD)
    if path is None:
        return None
    labels = _load_config(resolved).id2label
    head = read_pooled_head(path, n_classes=len(labels))
    if [str(labels[index]) for index in sorted(labels)] == list(classes) and head.pooling == pooling:
        return head
    log.info("the head of %s knows other classes; a new one is made", resolved)
    return None


def _make_head(config: Any, found: PooledHead | None, *, n_classes: int) -> torch.nn.Linear:
    head = torch.nn.Linear(config.hidden_size, n_classes)
    with torch.no_grad():
        if found is None:
            torch.nn.init.normal_(head.weight, std=getattr(config, "initializer_range", 0.02))
            torch.nn.init.zeros_(head.bias)
        else:
            head.weight.copy_(torch.from_numpy(found.weight))
            head.bias.copy_(torch.from_numpy(found.bias))
    return head


def _head_dropout(config: Any) -> float:
    """What the architecture would drop before its own head."""
    names = ("classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob")
    return next((float(value) for name in names if (value := getattr(config, name, None)) is not None), 0.1)


def _load_config(resolved: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(resolved)
    except (OSError, ValueError) as problem:
        raise UserError(f"model {resolved} cannot be loaded ({_one_line(problem)}); check model_name") from None


def _load_network(resolved: str, classes: Sequence[str], attention: str, pooling: str) -> Any:
    config = _load_config(resolved)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: index for index, name in enumerate(classes)}
    config.problem_type = "single_label_classification"
    if hasattr(config, "classifier_pooling") and pooling in ("cls", "mean"):
        config.classifier_pooling = pooling  # the architectures whose own head can pool by the mean
    network, missing = _from_pretrained(resolved, config, attention)
    prefix = f"{network.base_model_prefix}."
    lacking = [name for name in missing if name.startswith(prefix) and ("pooler" not in name or pooling == "pooler")]
    if lacking:
        raise UserError(
            f"model {resolved} lacks {len(lacking)} weights of its encoder ({', '.join(lacking[:3])}…) that would be "
            f"set at random; give a whole checkpoint"
        )
    return network


def _from_pretrained(resolved: str, config: Any, attention: str) -> tuple[Any, list[str]]:
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the table of new weights is read below, not by eyes
    transformers_logging.disable_progress_bar()
    try:
        for choice in _attention_choices(attention):
            try:
                network, info = AutoModelForSequenceClassification.from_pretrained(
                    resolved,
                    config=config,
                    attn_implementation=choice,
                    dtype=torch.float32,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
                return network, sorted(info["missing_keys"])
            except (ImportError, ValueError) as problem:  # how transformers says that an attention cannot run here
                if choice == "eager":
                    raise
                log.warning("attention %s cannot run here (%s); another one is used", choice, _one_line(problem))
    except Exception as problem:  # missing, cut short or foreign weights: as many kinds as formats
        raise UserError(f"model {resolved} cannot be loaded ({_one_line(problem)}); check model_name") from problem
    finally:
        transformers_logging.set_verbosity(level)
    raise UserError(f"model {resolved} runs with no attention that is known; set attention_implementation: eager")


def _attention_choices(asked: str) -> Iterator[str]:
    yield asked
    yield from (choice for choice in ("sdpa", "eager") if choice != asked)


def _longest(asked: int, network: Any, tokenizer: Any) -> int:
    positions = getattr(network.config, "max_position_embeddings", None) or asked
    # RoBERTa's kind numbers positions from padding_idx + 1 and so reads two tokens less than its table has rows.
    offset = 2 if getattr(network.config, "model_type", "") in {"roberta", "xlm-roberta", "camembert"} else 0
    return int(min(asked, positions - offset, tokenizer.model_max_length))


def _one_line(problem: BaseException) -> str:
    return " ".join(str(problem).split())[:300]
