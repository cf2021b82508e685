"""One section of a YAML file into a frozen, typed settings object, with every mistake listed at once.

    settings = load_settings("clustering.yaml", SuperviseSettings, section="supervise",
                             overrides=["supervise.batch_size=64"])

A settings class is a `Section`: unknown keys are errors, values are bounded, and a misspelt key is answered with
the nearest valid one. The names of all sections of a file are checked, so that a mistyped section is caught too.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

# Sections that live side by side in one clustering YAML; a script reads its own and the shared ones.
CLUSTERING_SECTIONS = (
    "engine",
    "supervise",
    "normalize_and_pca",
    "train",
    "purity_counter",
    "update_dataset",
    "llm",
    "llm_cluster",
    "clio",
)


class UserError(Exception):
    """A mistake that the user can mend: WHAT is wrong, WHERE, and WHAT TO DO. Printed without a traceback."""

    exit_code = 1


class ConfigError(UserError):
    """The configuration or the command line is wrong."""

    exit_code = 2


class Section(BaseModel):
    """Base of all settings: unknown keys are refused and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), validate_default=True)

    # Fields of this class that are top-level sections of the file, shared by several scripts.
    shared_sections: ClassVar[tuple[str, ...]] = ()

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_yes_and_no_as_numbers(cls, value: Any, info: Any) -> Any:
        # YAML reads `yes` and `on` as true, and pydantic would go on to read true as 1.
        if isinstance(value, bool) and not _accepts_bool(cls.model_fields[info.field_name].annotation):
            raise ValueError(f"{str(value).lower()} is not a valid value here (quote it if a text is meant)")
        return value


class RunSettings(Section):
    """Keys that every script has."""

    progress: bool = Field(True, description="show progress: a bar on a terminal, a line now and then elsewhere")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")

    @field_validator("log_level", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value


class EngineSettings(Section):
    """Where the shards of a stage are computed."""

    kind: Literal["local", "dask"] = Field("local", description="local: this machine; dask: a cluster by joblib")
    n_jobs: int = Field(1, ge=1, description="processes that work on shards at the same time; on GPUs, one each")
    address: str | None = Field(None, description="address of a Dask scheduler; null starts a LocalCluster")
    timeout_s: float = Field(3600.0, gt=0, description="longest time one shard may take before it is tried again")
    retries: int = Field(2, ge=0, description="further attempts for shards whose worker died")


class StageSettings(RunSettings):
    """What every stage has besides: the engine, a section that all stages share."""

    shared_sections: ClassVar[tuple[str, ...]] = ("engine",)

    engine: EngineSettings = EngineSettings()


AnySection = TypeVar("AnySection", bound=Section)


def load_settings(
    path: str | Path,
    settings_class: type[AnySection],
    *,
    section: str | None = None,
    overrides: Sequence[str] = (),
    known_sections: Sequence[str] = CLUSTERING_SECTIONS,
) -> AnySection:
    """Load and validate one section of a YAML file, or the whole file where `section` is None.

    `overrides` are `section.key=value` strings; they win over the file, later ones over earlier ones. Interpolations
    such as `${oc.env:NAME}` are resolved in the sections that this script reads and nowhere else.

    Raises ConfigError with every problem found, one a line.
    """
    values = _read_yaml(Path(path), overrides)
    if section is None:
        return _validate(settings_class, _resolve(values, path), section=None, path=path)
    problems = [
        f"{name}: no such section{did_you_mean(str(name), known_sections)}"
        for name in values
        if name not in known_sections
    ]
    own = _section_values(values, section, path, problems)
    for shared in settings_class.shared_sections:
        if shared in values:
            own[shared] = _section_values(values, shared, path, problems)
    return _validate(settings_class, own, section=section, path=path, problems=problems)


def settings_from_values(settings_class: type[AnySection], values: dict[str, Any], *, source: str) -> AnySection:
    """Validate plain values, for callers that build settings in code; raises ConfigError that names `source`."""
    return _validate(settings_class, values, section=None, path=source)


def settings_to_dict(settings: Section) -> dict[str, Any]:
    """Plain JSON-ready values of a settings object; secrets are masked."""
    return settings.model_dump(mode="json")


def settings_to_yaml(settings: Section, *, section: str | None = None) -> str:
    """The resolved settings as YAML that can be saved and loaded again; secrets are masked."""
    import yaml

    values = settings_to_dict(settings)
    shared = {name: values.pop(name) for name in settings.shared_sections}
    tree = values if section is None else {**shared, section: values}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path, overrides: Sequence[str]) -> Any:
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise ConfigError(f"config {path} {what}; give --config FILE")
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException) as problem:
        raise ConfigError(f"config {path} is not valid YAML: {_one_line(problem)}") from None
    except (UnicodeDecodeError, OSError) as problem:
        raise ConfigError(f"config {path} cannot be read: {_one_line(problem)}") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"config {path} must be a mapping of sections at its top, as in the example file")
    for override in overrides:
        if "=" not in override or override.startswith(("-", "=")):
            raise ConfigError(f"argument {override!r} is not understood; write section.key=value")
    try:
        return _override(loaded, overrides)
    except (YAMLError, OmegaConfBaseException) as problem:
        raise ConfigError(f"overrides {list(overrides)} cannot be applied to {path}: {_one_line(problem)}") from None


def _override(values: Any, overrides: Sequence[str]) -> Any:
    """Set each key to what is given for it, in turn; a mapping takes the place of one that is there, as a list does."""
    from omegaconf import DictConfig, OmegaConf

    for override in overrides:
        key, change = override.partition("=")[0], OmegaConf.from_dotlist([override])
        before, after = (OmegaConf.select(tree, key, throw_on_resolution_failure=False) for tree in (values, change))
        if isinstance(before, DictConfig) and isinstance(after, DictConfig):
            OmegaConf.update(values, key, {}, merge=False)  # else both would be merged, and `key={}` change nothing
        values = OmegaConf.merge(values, change)
    return values


def _section_values(values: Any, name: str, path: str | Path, problems: list[str]) -> dict[str, Any]:
    if name not in values:
        raise ConfigError("\n".join([f"config {path}: ", *problems, f"{name}: the section is missing; add `{name}:`"]))
    if values._get_node(name)._is_none():
        problems.append(f"{name}: the section is empty; put its keys under `{name}:`, indented")
        return {}
    section = values._get_node(name)
    if not hasattr(section, "keys"):
        problems.append(f"{name}: must be a section with keys, not {section!r}")
        return {}
    return _resolve(section, path)


def _resolve(node: Any, path: str | Path) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return dict(OmegaConf.to_container(node, resolve=True))  # type: ignore[arg-type]
    except OmegaConfBaseException as problem:
        raise ConfigError(f"config {path}: {_one_line(problem)}") from None


def _validate(
    settings_class: type[AnySection],
    values: dict[str, Any],
    *,
    section: str | None,
    path: str | Path,
    problems: Sequence[str] = (),
) -> AnySection:
    problems = list(problems)
    empty = any(problem.startswith(f"{section}: the section is empty") for problem in problems)
    try:
        settings = settings_class.model_validate(values)
    except ValidationError as invalid:
        problems += [
            _describe(error, settings_class, section)
            for error in invalid.errors()
            if not empty
            or error["loc"][0] in settings_class.shared_sections  # of an empty section all keys are missing
        ]
    if problems:
        raise ConfigError("\n  ".join([f"config {path}:", *problems]))
    return settings


def _describe(error: Any, settings_class: type[Section], section: str | None) -> str:
    location = [str(part) for part in error["loc"]]
    in_shared = bool(location) and location[0] in settings_class.shared_sections
    where = ".".join(location if section is None or in_shared else [section, *location])
    if error["type"] == "extra_forbidden":
        return f"{where}: no such key{did_you_mean(location[-1], _names_beside(settings_class, location))}"
    if error["type"] == "missing":
        return f"{where}: required, but missing"
    message = error["msg"].removeprefix("Value error, ").partition(", unable to")[0]
    given = error.get("input")
    value = "null" if given is None else repr(given)
    shown = "" if isinstance(given, (dict, BaseModel, SecretStr)) else f", not {value}"
    return f"{where or section}: {message[:1].lower()}{message[1:]}{shown if len(shown) < 120 else ''}"


def _names_beside(settings_class: type[BaseModel], location: Sequence[str]) -> list[str]:
    """The valid key names at the place where an unknown key stands."""
    model: Any = settings_class
    for part in location[:-1]:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            continue
        candidates = [field.annotation, *get_args(field.annotation)]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    names: list[str] = []
    for name, field in model.model_fields.items():
        names += [field.alias or name]
    return names


def did_you_mean(word: str, names: Sequence[str]) -> str:
    """The nearest valid name as an ending for a message, or the list of all where none is near."""
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f" (valid: {', '.join(names)})"


def _accepts_bool(annotation: Any) -> bool:
    return (
        annotation is bool
        or annotation is Any
        or any(_accepts_bool(part) for part in get_args(annotation))
        or (True in get_args(annotation))
    )


def _one_line(problem: BaseException) -> str:
    return " ".join(str(problem).split())


def canonical_json(values: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
