"""A model as a folder that others load: transformers, sentence-transformers, and cluster_supervise.py with our head."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from common.commit import make_folder, write_bytes, write_json
from common.config import UserError
from common.pooled_head import POOLED_HEAD, write_pooled_head
from metric_parts.model import JointModel


def save_model(model: JointModel, folder: Path) -> None:
    """Write weights, tokenizer and labels as transformers reads them, our head, and sentence-transformers' files."""
    from safetensors import SafetensorError

    write_pooled_head(folder / POOLED_HEAD, model.pooled_head())
    try:
        model.network.save_pretrained(folder)
    except SafetensorError as problem:  # a full disk comes as this, not as an OSError
        raise OSError(_errno_of(problem), str(problem), str(folder)) from problem
    for path in folder.glob("*.safetensors"):  # which safetensors makes for their owner's eyes alone
        shutil.copymode(folder / "config.json", path)
    model.tokenizer.save_pretrained(folder)
    _write_sentence_transformers_files(model, folder)


def _errno_of(problem: Exception) -> int | None:
    found = re.search(r"os error (\d+)", str(problem))
    return int(found[1]) if found else None


def _write_sentence_transformers_files(model: JointModel, folder: Path) -> None:
    dimension = model.network.config.hidden_size
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    make_folder(folder / "1_Pooling")
    write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": dimension,
            "pooling_mode_cls_token": model.pooling != "mean",
            "pooling_mode_mean_tokens": model.pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    )
    if model.pooling == "pooler":
        modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
        _write_pooler(model, folder / "2_Dense")
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": model.max_length, "do_lower_case": False})
    write_json(folder / "config_sentence_transformers.json", {"prompts": {}, "default_prompt_name": None})


def _write_pooler(model: JointModel, folder: Path) -> None:
    """The pooler of BERT's kind, tanh(W h + b) of the first token, as a module of sentence-transformers."""
    from safetensors.torch import save

    dense = getattr(model.network.base_model.pooler, "dense", None)
    if dense is None:
        raise UserError("pooling: pooler is for models whose pooler is one dense layer; set pooling: cls or mean")
    make_folder(folder)
    write_json(
        folder / "config.json",
        {
            "in_features": dense.in_features,
            "out_features": dense.out_features,
            "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        },
    )
    weights = {"linear.weight": dense.weight.detach().cpu(), "linear.bias": dense.bias.detach().cpu()}
    write_bytes(folder / "model.safetensors", save(weights))
