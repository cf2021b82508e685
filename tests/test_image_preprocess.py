"""Trim, resize, equalise, and the promise that an image and its negative look alike to every model."""

from __future__ import annotations

import numpy as np
import pytest

from common.config import UserError
from image_parts.extractors import HogExtractor, identify_model, make_extractor
from image_parts.preprocess import needed_size, prepare_image
from image_parts.settings import ModelSettings, PreprocessingSettings
from tests.image_files import picture, tiny_dinov2, tiny_resnet


@pytest.fixture(scope="module")
def model_folders(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {"dinov2": tiny_dinov2(folder / "dinov2"), "resnet": tiny_resnet(folder / "resnet"), "hog": "hog"}


def plain(**changes) -> PreprocessingSettings:
    return PreprocessingSettings(**{"equalization": "none", "polarity_invariant": False, **changes})


def test_planes_have_the_promised_shapes():
    for pixels in (picture(), picture()[:, :, 0]):
        assert prepare_image(pixels, PreprocessingSettings(), image_size=32).shape == (2, 32, 32, 1)
        assert prepare_image(pixels, plain(), image_size=32).shape == (1, 32, 32, 1)
    assert prepare_image(picture(), plain(grayscale=False), image_size=32).shape == (1, 32, 32, 3)


def test_letterbox_shows_the_whole_image_between_bars():
    planes = prepare_image(np.full((20, 40), 200, np.uint8), plain(resize="letterbox"), image_size=16)
    assert (planes[0, :4, :, 0] == 114).all() and (planes[0, 12:, :, 0] == 114).all()
    assert (planes[0, 4:12, :, 0] == 200).all()


def test_crop_takes_the_middle_square_and_squash_everything():
    pixels = np.zeros((10, 30), np.uint8)
    pixels[:, 10:20] = 250
    assert (prepare_image(pixels, plain(resize="crop"), image_size=16) == 250).all()
    squashed = prepare_image(pixels, plain(resize="squash"), image_size=30)[0, :, :, 0]
    assert (squashed[:, 12:18] == 250).all() and (squashed[:, :8] == 0).all()


def test_trim_cuts_shares_of_each_side():
    pixels = np.zeros((10, 20), np.uint8)
    pixels[2:9, 10:] = 100
    trimmed = plain(trim_top=0.2, trim_bottom=0.1, trim_left=0.5, resize="squash")
    assert (prepare_image(pixels, trimmed, image_size=16) == 100).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (3, 2)])
@pytest.mark.parametrize("resize", ["letterbox", "crop", "squash"])
def test_thin_and_tiny_images_survive_the_hardest_trim(shape, resize):
    settings = PreprocessingSettings(resize=resize, trim_top=0.49, trim_bottom=0.5, trim_left=0.99)
    assert prepare_image(np.full(shape, 9, np.uint8), settings, image_size=16).shape == (2, 16, 16, 1)


def test_equalisation_spreads_contrast():
    dull = np.tile(np.linspace(100, 120, 64).astype(np.uint8), (64, 1))
    spreads = {}
    for name in ("none", "clahe", "he"):
        plane = prepare_image(dull, PreprocessingSettings(equalization=name, polarity_invariant=False), image_size=64)
        spreads[name] = int(plane.max()) - int(plane.min())
    assert spreads["none"] == 20 and spreads["clahe"] > 25 and spreads["he"] == 255
    off = prepare_image(dull, PreprocessingSettings(clahe=False, polarity_invariant=False), image_size=64)
    assert int(off.max()) - int(off.min()) == 20


def test_shrinking_averages_instead_of_dropping_pixels():
    checks = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    assert np.abs(prepare_image(checks, plain(), image_size=16).astype(int) - 128).max() <= 1


@pytest.mark.parametrize("grayscale", [True, False])
@pytest.mark.parametrize("equalization", ["clahe", "he", "none"])
@pytest.mark.parametrize("resize", ["letterbox", "crop", "squash"])
def test_the_negative_has_the_same_two_planes_bit_for_bit(grayscale, equalization, resize):
    settings = PreprocessingSettings(grayscale=grayscale, equalization=equalization, resize=resize, trim_top=0.1)
    pixels = np.random.default_rng(1).integers(0, 256, (90, 131, 3), dtype=np.uint8)
    planes = prepare_image(pixels, settings, image_size=56)
    negative = prepare_image(255 - pixels, settings, image_size=56)
    assert np.array_equal(planes[0], negative[1]) and np.array_equal(planes[1], negative[0])
    assert not np.array_equal(planes[0], planes[1])


@pytest.mark.parametrize("kind", ["dinov2", "resnet", "hog"])
def test_the_negative_has_the_same_vector_for_every_model(kind, model_folders):
    model = ModelSettings(name=model_folders[kind], image_size=56, device="cpu")
    extractor = make_extractor(model, identify_model(model))
    pixels = np.random.default_rng(2).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    both = [prepare_image(each, PreprocessingSettings(), image_size=56) for each in (pixels, 255 - pixels)]
    vectors = extractor.embed(np.stack(both))
    np.testing.assert_allclose(vectors[0], vectors[1], rtol=1e-5, atol=1e-6)
    # Without the second polarity they differ, so the test can fail.
    single = [
        prepare_image(each, PreprocessingSettings(polarity_invariant=False), image_size=56)
        for each in (pixels, 255 - pixels)
    ]
    apart = extractor.embed(np.stack(single))
    assert np.abs(apart[0] - apart[1]).max() > 1e-3


@pytest.mark.parametrize(("kind", "pooling", "dimension"), [
    ("dinov2", "cls", 32), ("dinov2", "mean_patch", 32), ("dinov2", "cls+mean", 64),
    ("resnet", "cls", 24), ("resnet", "mean_patch", 24), ("resnet", "cls+mean", 48),
])  # fmt: skip
def test_pooling(kind, pooling, dimension, model_folders):
    import torch
    from transformers import AutoModel

    model = ModelSettings(name=model_folders[kind], image_size=56, pooling=pooling, device="cpu", dtype="float32")
    extractor = make_extractor(model, identify_model(model))
    assert extractor.dimension == dimension
    planes = prepare_image(picture(), plain(grayscale=False), image_size=56)[None]
    vector = extractor.embed(planes)[0]

    network = AutoModel.from_pretrained(model_folders[kind]).eval()
    scaled = (torch.from_numpy(planes[0]).permute(0, 3, 1, 2).float() / 255).numpy()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    scaled = ((scaled - mean.reshape(1, 3, 1, 1)) / std.reshape(1, 3, 1, 1)).astype(np.float32)
    with torch.inference_mode():
        output = network(pixel_values=torch.from_numpy(scaled))
    hidden = output.last_hidden_state[0].numpy()
    if kind == "dinov2":
        summary, patches = output.pooler_output[0].numpy(), hidden[1:].mean(axis=0)
    else:
        summary = patches = hidden.mean(axis=(1, 2))
    expected = {"cls": summary, "mean_patch": patches, "cls+mean": np.concatenate([summary, patches])}[pooling]
    np.testing.assert_allclose(vector, expected, rtol=1e-4, atol=1e-5)


def test_a_models_own_mean_and_deviation_win(model_folders, tmp_path):
    import json
    import shutil

    folder = tmp_path / "own"
    shutil.copytree(model_folders["dinov2"], folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    planes = prepare_image(picture(), plain(), image_size=56)[None]
    vectors = []
    for name in (model_folders["dinov2"], str(folder)):
        model = ModelSettings(name=name, image_size=56, device="cpu")
        vectors.append(make_extractor(model, identify_model(model)).embed(planes))
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-4


def test_a_size_that_is_no_multiple_of_the_patch_is_refused(model_folders):
    model = ModelSettings(name=model_folders["dinov2"], image_size=60, device="cpu")
    with pytest.raises(UserError, match=r"multiple of the patch size 14.*use 56 or 70"):
        make_extractor(model, identify_model(model))


def test_models_that_are_not_there_are_refused_with_advice(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"no folder"):
        identify_model(ModelSettings(name=str(tmp_path / "absent"), image_size=224))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config.json"):
        identify_model(ModelSettings(name=str(tmp_path / "empty"), image_size=224))
    (tmp_path / "empty" / "config.json").write_text("{}")
    model = ModelSettings(name=str(tmp_path / "empty"), image_size=224, device="cpu")
    with pytest.raises(UserError, match=r"cannot be loaded.*hog"):
        make_extractor(model, identify_model(model))


def test_pinned_models_need_no_question(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    identity = identify_model(ModelSettings(device="cpu"))
    assert identity.source == "facebook/dinov2-small" and len(identity.revision) == 40
    assert identify_model(ModelSettings(revision="abc", device="cpu")).revision == "abc"


def test_a_model_folder_is_known_by_its_content(model_folders, tmp_path):
    import shutil

    copy = shutil.copytree(model_folders["dinov2"], tmp_path / "copy")
    keys = [
        identify_model(ModelSettings(name=str(name), image_size=56, device="cpu")).cache_key()
        for name in (model_folders["dinov2"], copy)
    ]
    assert keys[0] == keys[1]
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:-4] + b"abcd")
    assert identify_model(ModelSettings(name=str(copy), image_size=56, device="cpu")).cache_key() != keys[0]


def test_hog_is_that_of_scikit_image():
    from skimage.feature import hog

    model = ModelSettings(name="hog", image_size=64, hog_cells=4, hog_orientations=6)
    plane = prepare_image(picture(), plain(), image_size=64)
    extractor = HogExtractor(model)
    vector = extractor.embed(plane[None])[0]
    expected = hog(plane[0, :, :, 0], orientations=6, pixels_per_cell=(16, 16), cells_per_block=(2, 2))
    np.testing.assert_allclose(vector, expected, rtol=1e-5)
    assert extractor.dimension == len(vector) == 3 * 3 * 4 * 6


def test_needed_size_grows_with_the_trim():
    assert needed_size(plain(), image_size=224) == (224, 224)
    assert needed_size(plain(trim_left=0.25, trim_right=0.25, trim_top=0.2), image_size=100) == (200, 125)
