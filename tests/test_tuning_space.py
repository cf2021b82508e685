"""The search space: mistakes are named before anything runs, and what cannot matter is not searched."""

from __future__ import annotations

import pytest

from common.config import ConfigError, load_settings
from image_parts.settings import ImageSettings
from image_parts.tuning.phases import scale_settings
from image_parts.tuning.space import UnfitChoice, read_space
from image_parts.tuning.tuner import spread


def space_of(search_space, **values):
    tuning = {"search_strategy": "tpe", "search_space": search_space, **values.pop("tuning", {})}
    return read_space(ImageSettings.model_validate({"tuning": tuning, **values}))


@pytest.mark.parametrize(("search_space", "message"), [
    ({}, r"tuning.search_space is empty, .*; give e.g."),
    ({"clustering.min_cluster_size": []}, r"min_cluster_size: has no values; give a list such as \[50\]"),
    ({"clustering.min_cluster_size": [1, 5]}, r"clustering.min_cluster_size: 1: .*greater than or equal to 2"),
    ({"clustering.min_samples": [0]}, r"clustering.min_samples: 0: .*greater than or equal to 1"),
    ({"clustering.min_samples": [True]}, r"clustering.min_samples: True: true is not a valid value"),
    ({"clustering.cluster_selection_epsilon": [float("inf")]}, r"inf is no finite number"),
    ({"clustering.cluster_selection_method": ["leaves"]}, r"'leaves': .*'leaf' or 'eom'"),
    ({"clustering.min_clustersize": [5]}, r"no such key; did you mean 'min_cluster_size'\?"),
    ({"clusterin.min_cluster_size": [5]}, r"clusterin is no section; did you mean 'clustering'\?"),
    ({"purity.max_centroid_cosine": [0.9]}, r"purity changes no cluster; tune keys of model, preprocessing"),
    ({"model.batch_size": [8, 16]}, r"model.batch_size: changes how .* not what they are; leave it out"),
    ({"reduction.umap_components": [[2, 3]]}, r"umap_components: \[2, 3\]: .*valid integer"),
])  # fmt: skip
def test_mistakes_are_config_errors(search_space, message):
    with pytest.raises(ConfigError, match=message):
        space_of(search_space)


def test_all_mistakes_come_at_once():
    with pytest.raises(ConfigError) as refused:
        space_of({"clustering.min_samples": [0, "x"], "reduction.umap_min_dist": [2], "model.nam": ["hog"]})
    assert str(refused.value).count("\n") == 4


def test_a_huge_grid_is_refused_with_its_number():
    huge = {"clustering.min_cluster_size": range(2, 1002), "clustering.min_samples": range(1, 1001),
            "reduction.umap_n_neighbors": range(2, 1002)}  # fmt: skip
    with pytest.raises(ConfigError, match="1,000,000,000 points, too many for search_strategy grid"):
        space_of({name: list(values) for name, values in huge.items()}, tuning={"search_strategy": "grid"})
    assert space_of({name: list(values) for name, values in huge.items()}).n_points == 10**9


def test_keys_may_be_nested_or_dotted_and_single_values_need_no_list(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "tuning:\n  search_space:\n    clustering.min_cluster_size: [20, 10, 20]\n    reduction: {umap_components: 5}\n"
    )
    settings = load_settings(config, ImageSettings, overrides=["tuning.search_space.clustering.min_samples=[3,1]"])
    assert {p.name: p.values for p in read_space(settings).parameters} == {
        "clustering.min_cluster_size": (10, 20),
        "clustering.min_samples": (1, 3),
        "reduction.umap_components": (5,),
    }


def test_values_that_clash_are_unfit_not_wrong():
    space = space_of({"clustering.min_cluster_size": [5, 50], "clustering.min_samples": [10]})
    assert space.settings_of({"clustering.min_samples": 10}).clustering.min_cluster_size == 50
    with pytest.raises(UnfitChoice, match="min_samples 10 is above min_cluster_size 5"):
        space.settings_of({"clustering.min_samples": 10, "clustering.min_cluster_size": 5})


def test_parameters_that_cannot_matter_are_left_out():
    space = space_of(
        {
            "preprocessing.clahe_clip_limit": [2.0, 4.0],
            "model.hog_cells": [4, 8],
            "preprocessing.equalization": ["clahe", "none"],
            "preprocessing.clahe": [True, False],
        }
    )
    with_clahe = {"preprocessing.clahe": True, "preprocessing.equalization": "clahe"}
    assert space.complete(with_clahe) == {**with_clahe, "preprocessing.clahe_clip_limit": 2.0}
    assert space.complete({"preprocessing.clahe": False}) == {"preprocessing.clahe": False}
    without = {**with_clahe, "preprocessing.equalization": "none"}
    assert space.complete(without) == without


def test_neighbors_are_one_step_away():
    space = space_of(
        {"clustering.min_cluster_size": [10, 20, 40], "clustering.cluster_selection_method": ["leaf", "eom"]}
    )
    center = {"clustering.min_cluster_size": 20, "clustering.cluster_selection_method": "leaf"}
    changed = [{k: v for k, v in other.items() if v != center[k]} for other in space.neighbors(center)]
    assert changed == [
        {"clustering.min_cluster_size": 10},
        {"clustering.min_cluster_size": 40},
        {"clustering.cluster_selection_method": "eom"},
    ]
    assert len(spread(space, [center], limit=100, n_rounds=1)) == 4
    assert len(spread(space, [center], limit=100, n_rounds=None)) == 6  # the whole space in the end
    assert spread(space, [center], limit=2, n_rounds=None)[0] == center


def test_sizes_shrink_with_the_sample():
    settings = ImageSettings.model_validate({"clustering": {"min_cluster_size": 40, "min_samples": 30}})
    scaled = scale_settings(settings, 0.1)
    assert (scaled.clustering.min_cluster_size, scaled.clustering.min_samples) == (5, 3)  # five at least
    assert scaled.reduction.umap_n_neighbors == 5 and scaled.reduction.umap_min_dist == 0.1
    tiny = ImageSettings.model_validate({"clustering": {"min_cluster_size": 3, "min_samples": 3}})
    assert scale_settings(tiny, 0.5).clustering.min_cluster_size == 3  # it was less before
