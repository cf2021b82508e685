"""The folder of one run, from the first check to the commit, and what its steps leave for a run that is started again.

    _SUCCESS            what the result was made from, and its files; written last
    steps/begun.json    the same for a run that is not finished
    steps/NAME.safetensors   vectors, clusters and places on the map
    cache.sqlite        answers, so that nothing is asked twice
    prompts.jsonl       every prompt and answer
    calls.json          what was estimated, asked and paid, by the last run

Everything else is the result: equal inputs and settings give equal bytes, however often a run was killed on the way.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.commit import (
    HeldOutput,
    Identity,
    describe_changes,
    make_folder,
    remove_stale_temporaries,
    sync_folder,
    write_bytes,
    write_json,
)
from common.config import UserError, canonical_json, settings_to_dict
from common.outputs import library_versions
from llm_parts.clio.settings import ClioSettings
from llm_parts.settings import LlmSettings

log = logging.getLogger(__name__)

STAGE = "clio"
SUCCESS = "_SUCCESS"
STEPS = "steps"
_BEGUN = "begun.json"
_SUFFIX = ".safetensors"
_MADE_FROM = "made_from"

# Keys of `llm` that change answers, and keys of `clio` that change no result.
_ANSWER_KEYS = ("provider", "model", "temperature", "top_p", "seed", "max_answer_tokens", "think")
_OTHER_KEYS = frozenset(("input", "output_dir", "log_prompts", "max_failure_rate"))

Arrays = dict[str, np.ndarray]


def identity_of(settings: ClioSettings, llm: LlmSettings) -> Identity:
    """What the result depends on."""
    from common.tables import fingerprint_input

    values = settings_to_dict(settings)
    keys = {f"clio.{name}": value for name, value in values.items() if name not in _OTHER_KEYS}
    answers = settings_to_dict(llm)
    keys |= {f"llm.{name}": answers[name] for name in _ANSWER_KEYS}
    return Identity(STAGE, keys, {settings.input_path: fingerprint_input(settings.input_path)})


class RunFolder(HeldOutput):
    """The folder of a run, held under its lock.

        with RunFolder(settings.output_dir, identity, overwrite=overwrite) as folder:
            if folder.result is None:
                folder.begin()
                vectors = folder.arrays("vectors", compute)["vectors"]
                ...
                folder.commit(result, files=[...])

    Until `begin` nothing is changed: who finds input or model wanting leaves the folder as it was.

    `results` are the names that a run may give to files and folders of its result: where one is overwritten, all of
    them go, lest a file of the old configuration stand beside those of the new one.
    Entering raises UserError where the folder holds the result of another configuration (and `overwrite` is off) or of
    another program, and LockHeld where another run is writing to it.
    """

    def __init__(
        self, folder: str | Path, identity: Identity, *, overwrite: bool = False, results: Sequence[str] = ()
    ) -> None:
        self.folder = Path(folder)
        self.identity = identity
        self._overwrite = overwrite
        self._results = results
        super().__init__(self.folder, is_file=False)
        self.steps = self.folder / STEPS
        self.cache_path = self.folder / "cache.sqlite"
        self.prompts_path = self.folder / "prompts.jsonl"
        self.calls_path = self.folder / "calls.json"

    def _claim(self) -> None:
        self._refuse_others()

    def begin(self) -> None:
        """Make the folder that of this configuration; an earlier result that is to be overwritten goes."""
        make_folder(self.steps)
        for folder in (self.folder, self.steps):
            remove_stale_temporaries(folder)
        if self._overwrite:
            self._clear()
        if self._read(self.folder / SUCCESS) is None:
            write_json(self.steps / _BEGUN, {"identity": self.identity.to_dict()})

    @property
    def result(self) -> dict[str, Any] | None:
        """What the finished run said; None where there is none, where a file of it is missing or damaged, and where
        it is to be overwritten."""
        success = None if self._overwrite else self._read(self.folder / SUCCESS)
        if success is None:
            return None
        for name, crc in success["files"].items():
            if not (self.folder / name).is_file() or _crc(self.folder / name) != crc:
                log.warning("%s is missing or was changed; the run goes through its steps again", self.folder / name)
                return None
        return dict(success["result"])

    def arrays(self, name: str, compute: Callable[[], Arrays], *, made_from: Sequence[Any]) -> Arrays:
        """What `compute` gives, kept in steps/; taken from there where it was computed from the same things before.

        `made_from` are texts, arrays and other values of which the result is made. Raises OSError where the disk
        refuses.
        """
        from safetensors.numpy import save

        path = self.steps / f"{name}{_SUFFIX}"
        fingerprint = fingerprint_of(self.identity.fingerprint, *made_from)
        found = _load(path, fingerprint) if path.exists() else None
        if found is not None:
            log.info("%s: taken from %s", name, path)
            return found
        computed = compute()
        whole = {key: np.ascontiguousarray(value) for key, value in computed.items()}
        write_bytes(path, save(whole, {_MADE_FROM: fingerprint}))
        return computed

    def forget(self, name: str) -> None:
        """Remove what `arrays` keeps under this name, or under all names of a pattern such as `part-*`."""
        for path in self.steps.glob(f"{name}{_SUFFIX}"):
            path.unlink()

    def commit(self, result: dict[str, Any], *, files: list[str], config: dict[str, Any]) -> None:
        """Mark the run as done."""
        success = {
            "stage": STAGE,
            "fingerprint": self.identity.fingerprint,
            "identity": self.identity.to_dict(),
            "config": config,
            "versions": library_versions(),
            "files": {name: _crc(self.folder / name) for name in files},
            "result": result,
        }
        write_json(self.folder / SUCCESS, success)

    # --- What an earlier run left ------------------------------------------------------------------------------------

    def _refuse_others(self) -> None:
        before = self._identity_before()
        if before is None:
            self._refuse_foreign_files()
            return
        if before.get("stage") != STAGE:
            raise UserError(
                f"output folder {self.folder} holds the result of {before.get('stage')!r}; choose another output folder"
            )
        now = self.identity.to_dict()
        if before != now and not self._overwrite:
            raise UserError(
                f"output folder {self.folder} holds the result of another configuration "
                f"({describe_changes(before, now)}); choose another output folder, or replace it with --overwrite"
            )

    def _identity_before(self) -> dict[str, Any] | None:
        for path in (self.folder / SUCCESS, self.steps / _BEGUN):
            found = self._read(path)
            if found is not None:
                return dict(found["identity"])
        return None

    def _refuse_foreign_files(self) -> None:
        if not self.folder.is_dir():
            return
        foreign = [path.name for path in sorted(self.folder.iterdir()) if not path.name.startswith(".")]
        # What a run writes before it begins, while it asks the models whether they are there.
        own = (STEPS, self.prompts_path.name, self.calls_path.name, self.cache_path.name, *_companions(self.cache_path))
        foreign = [name for name in foreign if name not in own]
        if foreign:
            raise UserError(
                f"output folder {self.folder} holds {foreign[0]}, which no run of clio wrote; "
                f"choose another output folder"
            )

    def _clear(self) -> None:
        """Forget the earlier run, its answers apart; `_SUCCESS` first, so that nobody takes the rest for finished."""
        (self.folder / SUCCESS).unlink(missing_ok=True)
        sync_folder(self.folder)
        self.forget("*")
        for name in (*self._results, self.calls_path.name):
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if self.prompts_path.exists():
            os.truncate(self.prompts_path, 0)  # not removed: the log of this run is open, and appends

    def _read(self, path: Path) -> dict[str, Any] | None:
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if isinstance(found, dict) and isinstance(found.get("identity"), dict):
            return found
        if self._overwrite:
            return None
        raise UserError(f"{path} is damaged; delete it, or start the run anew with --overwrite")


def fingerprint_of(*parts: Any) -> str:
    """sha256 over arrays by type, shape and bytes, and over everything else by its JSON."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype} {part.shape} ".encode())
            digest.update(np.ascontiguousarray(part).view(np.uint8).data)
        else:
            digest.update(canonical_json(part).encode("utf-8", "replace") + b"\n")
    return digest.hexdigest()


def _load(path: Path, fingerprint: str) -> Arrays | None:
    """The arrays of a file that was made from the same things; None where it was not, or is damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    content = path.read_bytes()
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        if header["__metadata__"][_MADE_FROM] != fingerprint:
            return None
        return dict(load(content))
    except (SafetensorError, ValueError, KeyError, TypeError) as problem:
        log.warning("%s is damaged (%s); it is computed again", path, problem)
        return None


def _companions(path: Path) -> tuple[str, str]:
    """The files that SQLite keeps beside a database that is open."""
    return f"{path.name}-wal", f"{path.name}-shm"


def _crc(path: Path) -> int:
    code = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            code = zlib.crc32(block, code)
    return code
