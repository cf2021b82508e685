"""Loading what a checkpoint really contains: tokenizer, weights, and a classification head where there is one.

transformers would initialise what is missing at random and say so in a report that nobody reads; here it is read. A
head on the pooled vector, which train_metric_classifier.py writes, comes before the architecture's own.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

from common.config import UserError
from common.model_files import cannot_load, find_side_file, read_side_file
from common.pooled_head import POOLED_HEAD, PooledHead, read_pooled_head
from common.pooling import Pooling

log = logging.getLogger(__name__)

Head = Literal["auto", "classifier", "none"]


@dataclass(frozen=True)
class Checkpoint:
    """A model as transformers loads it, and how it classifies."""

    model: Any
    classes: list[str] | None = None  # in the order of the logits; None where there is no head
    head: PooledHead | None = None  # on the pooled vector; None where the architecture's own is used, or none


def load_checkpoint(model: str, *, pooling: Pooling, head: Head, revision: str | None = None) -> Checkpoint:
    """Load the weights of a folder or a hub id; a head as `load_encoder` has it.

    Raises UserError where weights that are asked for are missing or cannot be read.
    """
    if head != "none":
        pooled_head = _find_pooled_head(model, revision)
        if pooled_head is not None:
            base = _load_base(model, revision, with_pooler="pooler" in (pooling, pooled_head.pooling))
            return Checkpoint(base, _class_names(base.config), pooled_head)
        classifier = _load_classifier(model, revision, demanded=head == "classifier")
        if classifier is not None:
            return Checkpoint(classifier, _class_names(classifier.config))
    return Checkpoint(_load_base(model, revision, with_pooler=pooling == "pooler"))


def _find_pooled_head(model: str, revision: str | None) -> PooledHead | None:
    from transformers import AutoConfig

    path = find_side_file(model, POOLED_HEAD, revision=revision)
    if path is None:
        return None
    config = AutoConfig.from_pretrained(model, revision=revision)
    return read_pooled_head(path, n_classes=len(config.id2label))


def _class_names(config: Any) -> list[str]:
    return [str(config.id2label[index]) for index in sorted(config.id2label)]


def _load_classifier(model: str, revision: str | None, *, demanded: bool) -> Any | None:
    """The model with its architecture's own head; None where the checkpoint has none and none is `demanded`."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    reason = _why_no_head(AutoConfig.from_pretrained(model, revision=revision))
    if reason is None:
        loaded, missing = _load_weights(AutoModelForSequenceClassification, model, revision)
        base = f"{loaded.base_model_prefix}."
        # BERT's kind classifies what its pooler makes of the first token, so that a pooler is a part of the head.
        without_head = [name for name in missing if "pooler" in name or not name.startswith(base)]
        if not without_head:
            _refuse_missing(model, missing)
            return loaded
        reason = f"the weights lack {', '.join(without_head[:3])}"
    if demanded:
        raise UserError(f"model {model} has no classification head ({reason}); set head: auto, prototype or none")
    log.info("model %s has no classification head (%s)", model, reason)
    return None


def _why_no_head(config: Any) -> str | None:
    """What a config says against a head of class probabilities; None where it declares one."""
    if not any(str(name).endswith("ForSequenceClassification") for name in config.architectures or ()):
        return "its config declares none"
    return "its head has a single output, which is no class probability" if config.num_labels < 2 else None


def _load_base(model: str, revision: str | None, *, with_pooler: bool) -> Any:
    from transformers import AutoModel

    loaded, missing = _load_weights(AutoModel, model, revision)
    _refuse_missing(model, [name for name in missing if with_pooler or "pooler" not in name])
    return loaded


def _load_weights(auto_class: Any, model: str, revision: str | None) -> tuple[Any, list[str]]:
    from transformers.utils import logging as transformers_logging

    # Its table of missing weights is for eyes; the same facts come back in `info` and are acted upon.
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        loaded, info = auto_class.from_pretrained(model, revision=revision, output_loading_info=True)
    except Exception as problem:  # missing, cut short or foreign weights: as many kinds as formats
        raise cannot_load(model, problem) from problem
    finally:
        transformers_logging.set_verbosity(level)
    return loaded, sorted(info["missing_keys"])


def _refuse_missing(model: str, missing: list[str]) -> None:
    if missing:
        raise UserError(
            f"model {model} lacks {len(missing)} weights ({', '.join(missing[:3])}…) that would be set at random; "
            f"give a whole checkpoint"
        )


# --- Tokenizer -------------------------------------------------------------------------------------------------------


def load_tokenizer(model: str, *, revision: str | None = None) -> Any:
    """The tokenizer of a folder or a hub id; raises UserError where there is none, or none with a vocabulary."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
    except Exception as problem:  # transformers raises a dozen kinds for one reason: it is not there, or is broken
        raise _no_tokenizer(model, " ".join(str(problem).split())[:200]) from problem
    # Where the vocabulary is missing, transformers makes a tokenizer of special tokens alone, which knows no word.
    if tokenizer.vocab_size <= len(set(tokenizer.all_special_ids)):
        raise _no_tokenizer(model, "its vocabulary is missing")
    return tokenizer


def _no_tokenizer(model: str, reason: str) -> UserError:
    return UserError(
        f"model {model} has no usable tokenizer ({reason}); save it beside the weights with save_pretrained"
    )


def longest_input(model: str, config: Any, tokenizer: Any, *, revision: str | None = None) -> int:
    """Tokens of a text that the model reads: the least of what its files, its positions and its tokenizer allow."""
    own = (read_side_file(model, "sentence_bert_config.json", revision=revision) or {}).get("max_seq_length")
    limits = [own, readable_positions(config), tokenizer.model_max_length]
    return int(min(limit for limit in limits if limit))


def readable_positions(config: Any) -> int | None:
    """Tokens that an architecture has positions for; None where it needs none."""
    positions = getattr(config, "max_position_embeddings", None)
    # RoBERTa's kind numbers positions from padding_idx + 1 and so reads two tokens less than its table has rows.
    offset = 2 if getattr(config, "model_type", "") in {"roberta", "xlm-roberta", "camembert"} else 0
    return int(positions) - offset if positions else None
