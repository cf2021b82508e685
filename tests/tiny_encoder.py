"""A random BERT of two layers with a tokenizer of its own, and rows to train it on: for tests of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

_VERBS = ("lose", "open", "close", "change", "find", "block", "pay", "send")
_NOUNS = ("card", "account", "password", "money", "limit", "address", "phone", "bill")
CLASSES = ["block card", "pay bill", "lose password"]  # of `save_classifier`
_FILLERS = ("please", "now", "today", "help", "again", "my", "the", "a", "how", "can", "i", "you")


def save_tiny_encoder(folder: Path, *, dropout: float = 0.1, seed: int = 0) -> Path:
    """Save a random two-layer BERT of 32 dimensions, with tokenizer and mean pooling, as a model folder."""
    import json

    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *_VERBS, *_NOUNS, *_FILLERS, *(str(n) for n in range(60))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=32,
    )  # fmt: skip
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def save_classifier(folder: Path) -> Path:
    """The tiny encoder with a classification head of three named classes."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    save_tiny_encoder(folder, dropout=0.0)
    config = BertConfig.from_pretrained(folder)
    config.id2label, config.label2id = dict(enumerate(CLASSES)), {name: i for i, name in enumerate(CLASSES)}
    torch.manual_seed(1)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def training_rows(*, n_classes: int = 6, n_per_class: int = 10, seed: int = 0) -> dict[str, list[object]]:
    """Texts whose verb and noun tell their class; no two texts are equal; both masks are 1."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[object]] = {"text": [], "label": [], "metric_mask": [], "classifier_mask": []}
    for code in range(n_classes):
        for number in range(n_per_class):
            fillers = rng.choice(_FILLERS, 2 + number % 4)
            rows["text"].append(f"{_VERBS[code]} {' '.join(fillers)} {_NOUNS[code]} {number + code}")
            rows["label"].append(f"{_VERBS[code]}_{_NOUNS[code]}")
            rows["metric_mask"].append(1)
            rows["classifier_mask"].append(1)
    return rows


def write_rows(path: Path, rows: dict[str, list[object]]) -> Path:
    """Write rows as one parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows), path)
    return path


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with dropout 0.1."""
    return save_tiny_encoder(tmp_path_factory.mktemp("tiny_encoder"))


@pytest.fixture(scope="session")
def still_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model without dropout."""
    return save_tiny_encoder(tmp_path_factory.mktemp("still_encoder"), dropout=0.0)
