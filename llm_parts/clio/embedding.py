"""Facets as vectors: by a sentence-embedding model, or by the last hidden layer of a causal language model.

    vectors = embed_facets({"request": requests, "task": tasks}, settings=settings, weights={"request": 1, "task": 0.5})

A causal model gives what comes out of its last layer, behind the last norm, and never its input embeddings: the mean
over the tokens of a text, or the last token, which alone has seen all others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from common.config import UserError
from common.progress import Progress
from llm_parts.clio.vector_settings import EmbeddingSettings, VectorSettings
from llm_parts.word_vectors import WordEmbedder

if TYPE_CHECKING:
    from common.encoder import TextEncoder

log = logging.getLogger(__name__)

# Texts that are encoded, and kept, together: seconds of a sentence model, minutes of a causal one. More of them would
# save next to nothing, since a batch that goes through the model is far smaller and holds texts of about one length.
PART_TEXTS = 2048

# Gives the vectors [n, d] of some texts: those that an earlier run left, else what the function computes.
Keep = Callable[[Sequence[str], Callable[[], np.ndarray]], np.ndarray]


class _Encode(Protocol):
    def __call__(self, texts: Sequence[str], *, on_progress: Callable[[int], None]) -> np.ndarray: ...


def embed_facets(
    columns: Mapping[str, Sequence[str]],
    *,
    settings: VectorSettings,
    weights: Mapping[str, float] | None = None,
    llm_model: str | None = None,
    progress: bool = False,
    keep: Keep | None = None,
) -> np.ndarray:
    """Embed facets, column name -> [n] texts, to unit vectors [n, d] float32, a block of dimensions for each column.

    The cosine of two rows is the mean of the cosines of their facets by `weights` (1 where they name none); a column of
    weight 0 is left out. An empty text has no direction: its block is zeros, and a row of empty texts is all zeros.
    `llm_model` is the causal model where `embedding.llm_model` names none; `keep` is that of `embed_texts`.

    Raises UserError for a model that cannot be loaded, or where no column has a weight; ValueError for unequal lengths.
    """
    from common.kmeans import unit_rows

    shares = _shares(columns, weights or {})
    if len({len(columns[name]) for name in shares}) > 1:
        raise ValueError(f"columns of unequal lengths: { {name: len(columns[name]) for name in shares} }")
    options: dict[str, Any] = {"settings": settings, "llm_model": llm_model, "progress": progress, "keep": keep}
    blocks = [embed_texts(columns[name], **options) * np.float32(share**0.5) for name, share in shares.items()]
    return blocks[0] if len(blocks) == 1 else unit_rows(np.hstack(blocks))


def embed_texts(
    texts: Sequence[str],
    *,
    settings: VectorSettings,
    llm_model: str | None = None,
    progress: bool = False,
    keep: Keep | None = None,
) -> np.ndarray:
    """Unit vectors [n, d] float32 of texts in their order; zeros for empty ones. Equal texts are embedded once.

    More than PART_TEXTS go through `keep` part by part, so that a run that was killed goes on with the next part.
    Raises UserError for a model that cannot be loaded.
    """
    from common.kmeans import unit_rows

    encode, dimension = _encoder(settings, llm_model)
    places = {text: place for place, text in enumerate(dict.fromkeys(text for text in texts if text.strip()))}
    unique = list(places)
    # The last row stays zero, for empty texts.
    vectors = np.zeros((len(unique) + 1, dimension), np.float32)
    if keep is None or len(unique) <= PART_TEXTS:
        keep = _compute
    with Progress(len(unique), label="embed", unit="facets", enabled=progress) as bar:
        for start in range(0, len(unique), PART_TEXTS):
            part = unique[start : start + PART_TEXTS]
            found = keep(part, partial(encode, part, on_progress=bar.update))
            vectors[start : start + len(part)] = unit_rows(found)
            bar.update(start + len(part) - bar.done)  # of a part that was kept, nothing was counted
    rows = np.fromiter((places.get(text, len(unique)) for text in texts), np.int64, len(texts))
    return vectors[rows]


def embedder_name(settings: VectorSettings, *, llm_model: str | None = None) -> str:
    """The model that the vectors come from; raises UserError where `embedder: llm` has none."""
    if settings.embedder == "sentence":
        return settings.embedding.sentence_model
    name = settings.embedding.llm_model or llm_model
    if name is None:
        raise UserError(
            "clio.embedder is llm, but there is no causal model to embed with; set clio.embedding.llm_model to a "
            "Hugging Face id or a folder"
        )
    return name


def _shares(columns: Mapping[str, Sequence[str]], weights: Mapping[str, float]) -> dict[str, float]:
    """The share of each column with a weight in the vector, which add up to 1."""
    used = {name: float(weights.get(name, 1.0)) for name in columns if weights.get(name, 1.0) > 0}
    if not used:
        raise UserError("clio.facets: none has a weight above 0, so there is nothing to cluster; give the first one 1")
    return {name: weight / sum(used.values()) for name, weight in used.items()}


def _encoder(settings: VectorSettings, llm_model: str | None) -> tuple[_Encode, int]:
    """What encodes texts, and the length of its vectors."""
    name, options = embedder_name(settings, llm_model=llm_model), settings.embedding
    if settings.embedder == "llm":
        encoder, template = load_causal_encoder(name, options=options), options.llm_template
    elif name == WordEmbedder.name:
        return _by_words, WordEmbedder._DIMENSION
    else:
        encoder, template = _load_sentence_encoder(name, options), "{text}"

    def encode(texts: Sequence[str], *, on_progress: Callable[[int], None]) -> np.ndarray:
        read = [template.replace("{text}", text) for text in texts]
        encoded = encoder.encode(read, batch_size=options.batch_size, on_progress=on_progress)
        if encoded.truncated.any():
            log.warning("embed: %d facets are longer than the model reads, and cut", encoded.truncated.sum())
        return encoded.vectors

    return encode, encoder.dimension


def _compute(_texts: Sequence[str], embed: Callable[[], np.ndarray]) -> np.ndarray:
    """Keeps nothing."""
    return embed()


def _by_words(texts: Sequence[str], *, on_progress: Callable[[int], None]) -> np.ndarray:
    on_progress(len(texts))
    return WordEmbedder().encode(texts)


def _load_sentence_encoder(name: str, options: EmbeddingSettings) -> TextEncoder:
    from common.backend import choose_device
    from common.encoder import load_encoder

    return load_encoder(name, device=choose_device("auto"), max_length=options.max_length)


# --- Causal models ---------------------------------------------------------------------------------------------------


def load_causal_encoder(name: str, *, options: EmbeddingSettings) -> TextEncoder:
    """A causal model as an encoder of texts: its layers without the head, pooled as `options.llm_pooling` says.

    The model is loaded once a process, and shared with a provider that answers by it.
    Raises UserError where there is no such model.
    """
    from common.encoder import TextEncoder
    from llm_parts.wires.transformers_wire import load_causal_lm

    try:
        model, tokenizer = load_causal_lm(name, load_in_4bit=options.load_in_4bit)
    except UserError as problem:
        raise UserError(f"clio.embedding.llm_model: {problem}") from None
    positions = getattr(model.config, "max_position_embeddings", None) or options.max_length
    return TextEncoder(
        _Layers(model.base_model),
        tokenizer,
        device=str(model.device),
        pooling=options.llm_pooling,
        max_length=min(options.max_length, positions),
        classes=None,
    )


class _Layers:
    """The layers of a causal model, called without a cache of keys and values: nothing is generated."""

    def __init__(self, base: Any) -> None:
        self.config = base.config
        self._base = base

    def __call__(self, **inputs: Any) -> Any:
        return self._base(**inputs, use_cache=False)
