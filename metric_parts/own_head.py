"""The architecture's own head, fitted to answer as the head on the pooled vector does.

transformers' pipeline knows an architecture's own head alone, which for most reads the first token. That head is not
trained: whenever a model is saved as the best, its last layer is fitted by ridge regression to give our logits from its
own inputs. cluster_supervise.py does not use it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from common.encoder import batches_by_length
from common.pooling import pool_output
from metric_parts.model import JointModel, Tokens, pad_rows

log = logging.getLogger(__name__)

# Texts to fit from. The widest encoders have 1,024 inputs to their last layer; four equations for each unknown.
_MAX_TEXTS = 4096
_HELD_OUT_SHARE = 0.2
_PENALTIES = np.logspace(-4, 4, 9)


def fit_own_head(model: JointModel, tokens: Tokens, *, seed: int) -> float | None:
    """Fit it from at most 4,096 of the texts; returns on how many of a fifth, held out, both heads name one class.

    Returns None where the architecture has no last layer to fit; one that reads more than a vector a text is set to
    find all classes equally likely.
    """
    layer = _last_layer(model.network)
    if layer is None:
        return None
    rows = np.random.default_rng(seed).permutation(len(tokens.ids))[:_MAX_TEXTS]
    inputs, logits = _collect(model, layer, tokens, rows)
    if inputs is None:
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter)
        log.warning("the own head of %s cannot be fitted", type(model.network).__name__)
        return None
    n_fitted = len(rows) - int(len(rows) * _HELD_OUT_SHARE)
    _fit(layer, inputs[:n_fitted], logits[:n_fitted])
    rest = slice(n_fitted, None) if n_fitted < len(rows) else slice(None)
    answers = inputs[rest] @ layer.weight.detach().cpu().numpy().T
    if layer.bias is not None:
        answers = answers + layer.bias.detach().cpu().numpy()
    return float((answers.argmax(axis=1) == logits[rest].argmax(axis=1)).mean())


def _last_layer(network: Any) -> torch.nn.Linear | None:
    inside = set(map(id, network.base_model.modules()))
    layers = [
        module
        for module in network.modules()
        if id(module) not in inside
        and isinstance(module, torch.nn.Linear)
        and module.out_features == network.config.num_labels
    ]
    return layers[-1] if layers else None


def _collect(
    model: JointModel, layer: torch.nn.Linear, tokens: Tokens, rows: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray]:
    """What goes into `layer` [n, h], or None where that is not one vector a text; and our logits [n, c]."""
    inputs = np.empty((len(rows), layer.in_features))
    logits = np.empty((len(rows), layer.out_features))
    was_training = model.network.training
    model.network.eval()
    with torch.no_grad(), _listening(layer) as to_layer, _listening(model.network.base_model) as to_base:
        for places in batches_by_length([len(tokens.ids[row]) for row in rows], 64):
            batch = pad_rows([tokens.ids[rows[place]] for place in places], padding=model.padding)
            arguments = {name: values.to(model.device) for name, values in batch.items()}
            with model.autocast():
                model.network(**arguments)
            (features, _), (_, output) = to_layer.pop(), to_base.pop()
            if features.ndim != 2:
                break
            vectors = pool_output(output, arguments["attention_mask"], model.pooling)
            inputs[places] = features.float().cpu().numpy()
            logits[places] = model.head(vectors).cpu().numpy()
    model.network.train(was_training)
    return inputs if features.ndim == 2 else None, logits


@contextmanager
def _listening(module: torch.nn.Module) -> Iterator[list[tuple[Any, Any]]]:
    """The first argument and the output of each call."""
    calls: list[tuple[Any, Any]] = []

    def keep(_: torch.nn.Module, arguments: Any, output: Any) -> None:
        calls.append((arguments[0] if arguments else None, output))

    handle = module.register_forward_hook(keep)
    try:
        yield calls
    finally:
        handle.remove()


def _fit(layer: torch.nn.Linear, inputs: np.ndarray, logits: np.ndarray) -> None:
    """The ridge regression with the penalty that leaves the smallest leave-one-out error."""
    from sklearn.linear_model import RidgeCV

    spread = np.sqrt(inputs.var(axis=0).mean()) or 1.0  # penalties mean the same for inputs of any size
    ridge = RidgeCV(_PENALTIES, fit_intercept=layer.bias is not None).fit(inputs / spread, logits)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(ridge.coef_.reshape(layer.weight.shape) / spread))
        if layer.bias is not None:
            layer.bias.copy_(torch.from_numpy(np.broadcast_to(ridge.intercept_, layer.bias.shape).copy()))
