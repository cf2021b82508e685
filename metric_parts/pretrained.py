"""A pretrained checkpoint as the network of both tasks: weights, tokenizer, and a head where the classes are the same.

transformers would set weights that are missing at random and go on; here those of the encoder are asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from common.backend import choose_dtype
from common.checkpoint import load_tokenizer, readable_positions
from common.config import UserError
from common.model_files import find_side_file, resolve_model
from common.pooled_head import POOLED_HEAD, PooledHead, read_pooled_head
from common.pooling import Pooling, read_pooling
from metric_parts.model import JointModel
from metric_parts.settings import TrainerSettings

log = logging.getLogger(__name__)

_PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16", "auto": "auto"}


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
    choices = _attention_choices(settings.training.attention_implementation, device=device, dtype=dtype)
    network = _load_network(resolved, classes, choices, chosen)
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


def _load_config(resolved: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(resolved)
    except (OSError, ValueError) as problem:
        raise UserError(f"model {resolved} cannot be loaded ({_one_line(problem)}); check model_name") from None


def _load_network(resolved: str, classes: Sequence[str], attentions: Sequence[str], pooling: str) -> Any:
    config = _load_config(resolved)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: index for index, name in enumerate(classes)}
    config.problem_type = "single_label_classification"
    if hasattr(config, "classifier_pooling") and pooling in ("cls", "mean"):
        config.classifier_pooling = pooling  # the architectures whose own head can pool by the mean
    network, missing = _from_pretrained(resolved, config, attentions)
    prefix = f"{network.base_model_prefix}."
    lacking = [name for name in missing if name.startswith(prefix) and ("pooler" not in name or pooling == "pooler")]
    if lacking:
        raise UserError(
            f"model {resolved} lacks {len(lacking)} weights of its encoder ({', '.join(lacking[:3])}…) that would be "
            f"set at random; give a whole checkpoint"
        )
    return network


def _from_pretrained(resolved: str, config: Any, attentions: Sequence[str]) -> tuple[Any, list[str]]:
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the table of new weights is read below, not by eyes
    transformers_logging.disable_progress_bar()
    try:
        for choice in attentions:
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


def _attention_choices(asked: str, *, device: str, dtype: str) -> list[str]:
    """What to try, in order: what is asked for, unless it is known to load and then fail in training."""
    others = [choice for choice in ("sdpa", "eager") if choice != asked]
    reason = None
    if asked == "flex_attention" and not device.startswith("cuda"):
        reason = "torch has its backward pass for CUDA alone"
    elif asked.startswith("flash_attention") and dtype == "float32":
        reason = "it needs mixed_precision bf16 or fp16"
    if reason is None:
        return [asked, *others]
    log.warning("attention %s cannot run here (%s); %s is used", asked, reason, others[0])
    return others


def _longest(asked: int, network: Any, tokenizer: Any) -> int:
    return int(min(asked, readable_positions(network.config) or asked, tokenizer.model_max_length))


def _one_line(problem: BaseException) -> str:
    return " ".join(str(problem).split())[:300]
