"""The example config and the page of the trainer against its settings."""

import re
from pathlib import Path

import yaml

from common.config import Section, load_settings, settings_to_dict
from metric_parts.settings import TrainerSettings
from metric_parts.trackers import flatten

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "metric_classifier_training.example.yaml"


def fields(section=TrainerSettings, prefix=""):
    found = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found.update(fields(field.annotation, f"{prefix}{name}."))
        else:
            found[prefix + name] = field
    return found


def documented():
    table = (ROOT / "docs" / "train_metric_classifier.md").read_text(encoding="utf-8").split("## Keys")[1]
    return dict(re.findall(r"^\| `([\w.]+)` \| `(.*?)` \|", table, re.MULTILINE))


def test_every_key_is_documented_with_its_default_and_no_other():
    assert set(documented()) == set(fields())
    for name, shown in documented().items():
        field = fields()[name]
        assert yaml.safe_load(shown) == ("required" if field.is_required() else field.default), name


def test_the_example_shows_every_key_and_loads():
    shown = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    assert {name for name in flatten(shown)} == set(fields())
    settings = load_settings(EXAMPLE, TrainerSettings)
    assert flatten(settings_to_dict(settings)) == flatten(shown)


def test_every_key_has_a_reason():
    assert all(field.description for field in fields().values())


def test_the_neptune_section_may_be_as_short_as_in_old_configs():
    values = {"data": {"parquet_path": "x"}, "neptune": {"project": "team/name", "tags": ["a"]}}
    assert TrainerSettings.model_validate(values).neptune.enabled is False
