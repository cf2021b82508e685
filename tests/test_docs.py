"""The documents against the code: every key is in the example and in its page, and no page names another."""

import importlib
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
STAGES = {
    "cluster_supervise": "supervise",
    "cluster_normalize_and_pca": "normalize_and_pca",
    "cluster_train_clusters": "train",
    "cluster_purity_counter": "purity_counter",
    "cluster_update_dataset": "update_dataset",
}


def settings_keys(script: str) -> set[str]:
    settings_class = importlib.import_module(script).Settings
    return set(settings_class.model_fields) - set(settings_class.shared_sections)


def documented_keys(page: str) -> dict[str, str]:
    """Key and default of the table under the heading Keys."""
    table = (ROOT / "docs" / page).read_text(encoding="utf-8").split("## Keys")[1]
    return dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.MULTILINE))


@pytest.fixture(scope="module")
def example() -> dict[str, dict[str, object]]:
    return yaml.safe_load((ROOT / "clustering.example.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("script", STAGES)
def test_every_key_is_documented_and_every_documented_key_exists(script):
    assert set(documented_keys(f"{script}.md")) == settings_keys(script)


@pytest.mark.parametrize("script", STAGES)
def test_documented_defaults_are_the_real_ones(script):
    fields = importlib.import_module(script).Settings.model_fields
    for key, shown in documented_keys(f"{script}.md").items():
        real = "required" if fields[key].is_required() else yaml.safe_dump(fields[key].default).split("\n")[0]
        shown = shown.strip("`").replace('""', "''")
        assert yaml.safe_load(shown) == yaml.safe_load(real), key


@pytest.mark.parametrize("script", STAGES)
def test_the_example_shows_every_key(script, example):
    assert set(example[STAGES[script]]) == settings_keys(script)


def test_the_example_shows_every_key_of_the_engine(example):
    from common.config import EngineSettings

    assert set(example["engine"]) == set(EngineSettings.model_fields)


@pytest.mark.parametrize("section", ["llm", "llm_cluster"])
def test_keys_of_the_llm_sections_are_shown_and_documented(section, example):
    from llm_cluster import LlmClusterSettings
    from llm_parts.settings import LlmSettings

    classes = {"llm": LlmSettings, "llm_cluster": LlmClusterSettings}
    keys = set(classes[section].model_fields) - set(classes[section].shared_sections)
    page = (ROOT / "docs" / "llm_cluster.md").read_text(encoding="utf-8")
    table = page.split(f"## Keys of `{section}`")[1].split("\n## ")[0]
    first_cells = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", table, re.MULTILINE)
    documented = {key for cell in first_cells for key in re.findall(r"`(\w+)`", cell)}
    assert documented == keys
    assert set(example[section]) == keys


def test_commands_of_the_readme_name_files_that_exist():
    commands = re.findall(
        r"^python (\S+) --config (\S+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(commands) >= 6
    for script, config in commands:
        assert (ROOT / script).is_file(), script
        assert (ROOT / config).is_file(), config


def test_links_in_the_documents_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
