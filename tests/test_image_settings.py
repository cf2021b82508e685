"""config.yaml, its defaults, its documentation and its errors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from common.config import ConfigError, load_settings, settings_to_yaml
from image_parts.settings import ImageSettings

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "config.yaml"
DOCS = ROOT / "docs" / "image_cluster.md"

# Read by iterative_tuning.py, whose own documentation lists its keys.
OF_OTHERS = "tuning"


def keys_of(model: type[BaseModel], prefix: str = "") -> set[str]:
    keys = set()
    for name, field in model.model_fields.items():
        if name == OF_OTHERS:
            continue
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys |= keys_of(field.annotation, f"{prefix}{name}.")
        else:
            keys.add(prefix + name)
    return keys


def flat(values: dict, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def test_config_yaml_holds_every_key_with_its_default():
    values = {name: value for name, value in yaml.safe_load(CONFIG.read_text()).items() if name != OF_OTHERS}
    defaults = {name: value for name, value in ImageSettings().model_dump(mode="json").items() if name != OF_OTHERS}
    assert flat(values) == flat(defaults)
    assert set(flat(values)) == keys_of(ImageSettings)


def test_every_key_of_config_yaml_says_why():
    lines = [line.strip() for line in CONFIG.read_text().splitlines() if re.match(r"^\s+\w+: ", line)]
    silent = [line.split(":")[0] for line in lines if "#" not in line]
    # The other three trims, and keys whose name and section say all.
    self_evident = ("trim_", "enabled", "silhouette_random_state", "label_")
    assert [key for key in silent if not key.startswith(self_evident)] == []


def documented_keys() -> dict[str, str]:
    """Keys and their defaults as the table in the documentation gives them."""
    table = DOCS.read_text().partition("\n## Keys\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `([\w.]+)` \| `(.*?)` \|", table, flags=re.MULTILINE))


def test_the_documentation_lists_every_key_and_no_other():
    assert set(documented_keys()) == keys_of(ImageSettings)


def test_documented_defaults_are_the_defaults():
    defaults = flat(ImageSettings().model_dump(mode="json"))
    assert {key: yaml.safe_load(value) for key, value in documented_keys().items()} == {
        key: value for key, value in defaults.items() if not key.startswith(f"{OF_OTHERS}.")
    }


def test_settings_survive_the_way_through_yaml(tmp_path):
    path = tmp_path / "again.yaml"
    settings = load_settings(
        CONFIG, ImageSettings, overrides=["clustering.min_cluster_size=7", "clustering.min_samples=2"]
    )
    path.write_text(settings_to_yaml(settings))
    assert load_settings(path, ImageSettings) == settings


def test_extensions_are_cleaned():
    settings = ImageSettings(image_extensions=["PNG", ".jpg", "*.Tif", "png"])
    assert settings.image_extensions == (".png", ".jpg", ".tif")


@pytest.mark.parametrize(("override", "message"), [
    ("model.image_size=225", r"model: image_size 225 is not a multiple of the patch size 14 .*; use 224 or 238"),
    ("clustering.min_samples=51", r"clustering: min_samples 51 is above min_cluster_size 50"),
    ("clustering.min_cluster_size=1", r"clustering.min_cluster_size: .*greater than or equal to 2"),
    ("preprocessing.trim_top=1.0", r"preprocessing.trim_top: .*less than 1"),
    ("modell.name=hog", r"modell: no such key; did you mean 'model'\?"),
    ("model.nmae=hog", r"model.nmae: no such key; did you mean 'name'\?"),
    ("mode=link", r"mode: .*'copy', 'move', 'hardlink' or 'symlink'"),
    ("annotations.label_subdir=img", r"annotations: image_subdir and label_subdir must be two different folders"),
    ("annotations.label_subdir=a/b", r"annotations.label_subdir: must be the name of one folder"),
    ("visualization.viz_dir=../pictures", r"visualization.viz_dir: must be a folder below output_dir"),
    ("image_extensions=[]", r"image_extensions: .*at least 1"),
    ("reduction.random_state=-1", r"reduction.random_state: .*greater than or equal to 0"),
    ("purity.enabled=3", r"purity.enabled: "),
])  # fmt: skip
def test_mistakes_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_settings(CONFIG, ImageSettings, overrides=[override])


def test_opposite_trims_and_all_errors_at_once():
    overrides = [
        "preprocessing.trim_left=0.6",
        "preprocessing.trim_right=0.4",
        "mode=x",
        "model.name=hog",
        "model.image_size=16",
    ]
    with pytest.raises(ConfigError) as refused:
        load_settings(CONFIG, ImageSettings, overrides=overrides)
    assert "leave nothing" in str(refused.value) and "mode:" in str(refused.value) and "hog_cells" in str(refused.value)


def test_nothing_heavy_is_imported_before_the_settings_are_right():
    code = (
        "import sys, image_cluster\n"
        "heavy = 'torch sklearn matplotlib umap hdbscan transformers pandas cv2 PIL pyarrow plotly numba'.split()\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_help_and_errors_come_from_the_command_line():
    help_text = subprocess.run(
        [sys.executable, "image_cluster.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for flag in ("--yes", "--resume", "--undo", "--check", "--overwrite", "--config"):
        assert flag in help_text
    wrong = subprocess.run(
        [sys.executable, "image_cluster.py", "mode=z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: config config.yaml:") and wrong.stdout == ""
    assert "Traceback" not in wrong.stderr


def test_the_rapids_requirements_are_those_of_all_scripts_without_torch():
    def lines(name: str) -> set[str]:
        return {line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")}

    assert lines("requirements_rapids_tuning.txt") < lines("requirements.txt")
    assert not any(line.startswith(("torch", "transformers")) for line in lines("requirements_rapids_tuning.txt"))
