"""One section of a YAML file into settings: every mistake at once, each with its place and the nearest valid name."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from pydantic import Field

from common.config import ConfigError, Section, StageSettings, load_settings, settings_from_values, settings_to_yaml


class Engine(Section):
    n_jobs: int = Field(1, ge=1)


class Settings(StageSettings):
    input_dir: str = Field(min_length=1)
    batch_size: int = Field(128, ge=1, le=4096)
    tol: float = Field(1e-3, ge=0)
    revision: str | None = None
    resume: bool = True


def load(tmp_path: Path, text: str, *overrides: str, section: str = "supervise") -> Settings:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_settings(path, Settings, section=section, overrides=overrides)


def problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    assert caught.value.exit_code == 2
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"config {tmp_path / 'config.yaml'}")
    return [line.strip() for line in lines[1:]]


GOOD = "supervise:\n  input_dir: runs/in\n"


def test_defaults_and_values_of_the_file(tmp_path):
    settings = load(tmp_path, GOOD + "  batch_size: 7\n")
    assert (settings.input_dir, settings.batch_size, settings.resume) == ("runs/in", 7, True)


def test_settings_do_not_change_after_loading(tmp_path):
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path, GOOD).batch_size = 3  # type: ignore[misc]


def test_mistyped_key_is_answered_with_the_nearest(tmp_path):
    assert problems(tmp_path, GOOD + "  batch_sise: 7\n") == [
        "supervise.batch_sise: no such key; did you mean 'batch_size'?"
    ]


def test_key_like_no_other_is_answered_with_all_of_them(tmp_path):
    (line,) = problems(tmp_path, GOOD + "  zzz: 7\n")
    assert line.startswith("supervise.zzz: no such key (valid: ")
    assert "batch_size" in line and "input_dir" in line


def test_mistyped_section_is_answered_with_the_nearest(tmp_path):
    lines = problems(tmp_path, "supervize:\n  input_dir: a\n")
    assert lines == [
        "supervize: no such section; did you mean 'supervise'?",
        "supervise: the section is missing; add `supervise:`",
    ]


def test_mistyped_section_of_another_script_is_found_too(tmp_path):
    assert problems(tmp_path, GOOD + "normalise_and_pca:\n  a: 1\n") == [
        "normalise_and_pca: no such section; did you mean 'normalize_and_pca'?"
    ]


def test_all_problems_come_at_once(tmp_path):
    text = (
        "supervise:\n  batch_size: 0\n  tol: -1\n  resme: true\n  log_level: loud\nsuprvise: {}\nengine: {n_jobs: 0}\n"
    )
    lines = problems(tmp_path, text)
    starts = sorted(line.split(":")[0] for line in lines)
    assert starts == [
        "engine.n_jobs",
        "supervise.batch_size",
        "supervise.input_dir",
        "supervise.log_level",
        "supervise.resme",
        "supervise.tol",
        "suprvise",
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("batch_size: many", "supervise.batch_size: input should be a valid integer, not 'many'"),
        ("batch_size: 1.5", "supervise.batch_size: input should be a valid integer"),
        ("batch_size: yes", "supervise.batch_size: true is not a valid value here"),
        ("tol: off", "supervise.tol: false is not a valid value here"),
        ("batch_size: 0", "supervise.batch_size: input should be greater than or equal to 1, not 0"),
        ("batch_size: 4097", "supervise.batch_size: input should be less than or equal to 4096, not 4097"),
        ("batch_size: [1, 2]", "supervise.batch_size: input should be a valid integer"),
        ("batch_size:", "supervise.batch_size: input should be a valid integer, not null"),
        ("resume: perhaps", "supervise.resume: input should be a valid boolean"),
        ("revision: no", "supervise.revision: false is not a valid value here (quote it if a text is meant)"),
        ("log_level: loud", "supervise.log_level: input should be 'debug', 'info', 'warning' or 'error', not 'loud'"),
    ],
)
def test_wrong_type_or_value(tmp_path, line, said):
    (found,) = problems(tmp_path, f"{GOOD}  {line}\n")
    assert found.startswith(said)


def test_required_key(tmp_path):
    assert problems(tmp_path, "supervise:\n  batch_size: 3\n") == ["supervise.input_dir: required, but missing"]
    (line,) = problems(tmp_path, "supervise:\n  input_dir: ''\n")
    assert line.startswith("supervise.input_dir: string should have at least 1 character")


def test_numbers_that_yaml_reads_as_text(tmp_path):
    assert load(tmp_path, GOOD + "  tol: 3e-4\n").tol == 3e-4  # PyYAML has it as the text "3e-4"


def test_level_in_any_case(tmp_path):
    assert load(tmp_path, GOOD + "  log_level: WARNING\n").log_level == "warning"


@pytest.mark.parametrize("empty", ["supervise:\n", "supervise: null\n", "supervise: ~\n"])
def test_empty_section(tmp_path, empty):
    assert problems(tmp_path, empty) == ["supervise: the section is empty; put its keys under `supervise:`, indented"]


@pytest.mark.parametrize("value", ["5", "text", "[a, b]"])
def test_section_that_is_no_mapping(tmp_path, value):
    lines = problems(tmp_path, f"supervise: {value}\n")
    assert lines[0].startswith("supervise: must be a section with keys")


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "only text\n"])
def test_file_without_sections(tmp_path, text):
    with pytest.raises(ConfigError):
        load(tmp_path, text)


@pytest.mark.parametrize(
    "text", [GOOD + "  batch_size: 1\n  batch_size: 2\n", GOOD + GOOD, GOOD + "engine: {n_jobs: 1, n_jobs: 2}\n"]
)
def test_duplicate_key(tmp_path, text):
    with pytest.raises(ConfigError, match=r"not valid YAML.*duplicate key"):
        load(tmp_path, text)


def test_yaml_that_does_not_parse(tmp_path):
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(tmp_path, "supervise: {input_dir: [}\n")
    (tmp_path / "latin.yaml").write_bytes(b"supervise: {input_dir: caf\xe9}\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml"):
        load_settings(tmp_path / "latin.yaml", Settings, section="supervise")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml does not exist; give --config FILE"):
        load_settings(tmp_path / "absent.yaml", Settings, section="supervise")
    with pytest.raises(ConfigError, match="is a folder, not a file"):
        load_settings(tmp_path, Settings, section="supervise")


# --- Overrides and interpolations ------------------------------------------------------------------------------------


def test_override_wins_over_the_file_and_is_typed(tmp_path):
    settings = load(tmp_path, GOOD + "  batch_size: 7\n", "supervise.batch_size=64", "supervise.resume=false")
    assert (settings.batch_size, settings.resume) == (64, False)


def test_override_of_an_empty_section_and_of_a_shared_one(tmp_path):
    settings = load(tmp_path, GOOD, "engine.n_jobs=3")
    assert settings.engine.n_jobs == 3
    assert load(tmp_path, "supervise:\n", "supervise.input_dir=x").input_dir == "x"


def test_override_may_hold_an_equals_sign_and_null(tmp_path):
    settings = load(tmp_path, GOOD + "  revision: main\n", "supervise.input_dir=a=b", "supervise.revision=null")
    assert (settings.input_dir, settings.revision) == ("a=b", None)


def test_override_by_a_mapping_takes_the_place_of_the_one_in_the_file(tmp_path):
    """`key={}` empties it; a key of it alone is set by its dotted name, and the last word counts."""

    class Searched(Section):
        space: dict[str, list[int]] = Field({})

    path = tmp_path / "config.yaml"
    path.write_text("tuning:\n  space: {model.cells: [1, 2], model.size: [3]}\n", encoding="utf-8")

    def space(*overrides: str) -> dict[str, list[int]]:
        return load_settings(path, Searched, section="tuning", overrides=overrides, known_sections=["tuning"]).space

    assert space("tuning.space={}") == {}
    assert space("tuning.space={other.key: [5]}") == {"other.key": [5]}
    assert space("tuning.space={a: [5]}", "tuning.space.b=[6]") == {"a": [5], "b": [6]}
    assert space("tuning.space.b=[6]", "tuning.space={}") == {}
    assert space("tuning={}") == {}
    assert space("tuning.space.b=[6]") == {"model.cells": [1, 2], "model.size": [3], "b": [6]}


def test_mistyped_override(tmp_path):
    assert problems(tmp_path, GOOD, "supervise.batchsize=3") == [
        "supervise.batchsize: no such key; did you mean 'batch_size'?"
    ]
    assert problems(tmp_path, GOOD, "supervice.batch_size=3") == [
        "supervice: no such section; did you mean 'supervise'?"
    ]


@pytest.mark.parametrize("override", ["supervise.batch_size", "batch", "=3", "-x=3"])
def test_override_that_is_none(tmp_path, override):
    with pytest.raises(ConfigError, match=r"write section\.key=value"):
        load(tmp_path, GOOD, override)


def test_override_through_a_value_that_is_no_section(tmp_path):
    with pytest.raises(ConfigError):
        load(tmp_path, GOOD, "supervise.batch_size.deep=3")


def test_environment_variables_are_read_in_the_own_section_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("CLUSTERING_TEST_DIR", "/from/env")
    monkeypatch.delenv("CLUSTERING_TEST_ABSENT", raising=False)
    text = "supervise:\n  input_dir: ${oc.env:CLUSTERING_TEST_DIR}\nllm:\n  api_key: ${oc.env:CLUSTERING_TEST_ABSENT}\n"
    assert load(tmp_path, text).input_dir == "/from/env"
    with pytest.raises(ConfigError, match="CLUSTERING_TEST_ABSENT"):
        load(tmp_path, "supervise:\n  input_dir: ${oc.env:CLUSTERING_TEST_ABSENT}\n")


def test_environment_variable_with_a_default_and_a_reference_to_another_section(tmp_path):
    text = (
        "supervise:\n  input_dir: ${oc.env:CLUSTERING_TEST_ABSENT,here}\n  revision: ${llm.model}\nllm:\n  model: m1\n"
    )
    settings = load(tmp_path, text)
    assert (settings.input_dir, settings.revision) == ("here", "m1")


# --- In code, and back to YAML ---------------------------------------------------------------------------------------


def test_settings_from_values_names_their_source():
    with pytest.raises(ConfigError, match=r"trial 3:\n  batch_sise: no such key; did you mean 'batch_size'\?"):
        settings_from_values(Settings, {"input_dir": "a", "batch_sise": 2}, source="trial 3")


def test_nested_key_is_answered_with_names_of_its_own_section(tmp_path):
    class Outer(Section):
        shared_sections: ClassVar[tuple[str, ...]] = ("engine",)
        inner: Engine = Engine()
        engine: Engine = Engine()

    path = tmp_path / "config.yaml"
    path.write_text("train: {inner: {n_job: 2}}\nengine: {njobs: 3}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_settings(path, Outer, section="train")
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "train.inner.n_job: no such key; did you mean 'n_jobs'?",
        "engine.njobs: no such key; did you mean 'n_jobs'?",
    ]


def test_printed_settings_load_again_as_the_same(tmp_path):
    settings = load(tmp_path, GOOD + "  tol: 0.5\n  revision: 'no'\nengine: {n_jobs: 4}\n")
    text = settings_to_yaml(settings, section="supervise")
    assert yaml.safe_load(text)["engine"]["n_jobs"] == 4
    assert load(tmp_path, text) == settings
