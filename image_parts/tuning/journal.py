"""The search as an Optuna journal: an append-only file that optuna-dashboard and Optuna's plots read too.

    journal = open_journal(tuning_dir / "study.journal")
    study = journal_study(journal, "phase 2")

Only finished trials are written, each as one line, so that a kill leaves whole trials and at most one torn line, which
is cut off when the journal is opened again.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.commit import make_folder

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)


def open_journal(path: Path) -> optuna.storages.JournalStorage:
    """Open or create a journal; the caller holds the lock of the output, so that no other process writes to it."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    class Quick(JournalFileBackend):
        """Without a flush to the disk after every line: a batch is flushed as a whole, by `flush_journal`."""

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            with path.open("ab") as file:
                file.write("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in logs).encode())

    class HeldAlready(JournalFileOpenLock):
        """Optuna's own lock is a file that outlives a killed process for half a minute."""

        def acquire(self) -> bool:
            return True

        def release(self) -> None:
            pass

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    make_folder(path.parent)
    _cut_torn_line(path)
    return JournalStorage(Quick(str(path), lock_obj=HeldAlready(str(path))))


def flush_journal(path: Path) -> None:
    """Make sure that what was appended survives a power cut."""
    with path.open("ab") as file:
        os.fsync(file.fileno())


def journal_study(journal: optuna.storages.JournalStorage, name: str) -> optuna.Study:
    """The study of this name, created if it is not there."""
    import optuna

    return optuna.create_study(storage=journal, study_name=name, direction="maximize", load_if_exists=True)


def copy_trial(trial: optuna.trial.FrozenTrial) -> optuna.trial.FrozenTrial:
    """A finished trial as one that can be added to another study."""
    import optuna

    values: dict[str, Any] = {
        "state": trial.state,
        "params": trial.params,
        "distributions": trial.distributions,
        "user_attrs": trial.user_attrs,
        "system_attrs": trial.system_attrs,
    }
    return optuna.trial.create_trial(value=trial.value if trial.values else None, **values)


def _cut_torn_line(path: Path) -> None:
    """A line without its end was not written to the end; what follows it would be unreadable."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        log.info("%s: the last line was cut short by a kill and is dropped", path)
        with path.open("r+b") as file:
            file.truncate(whole)
            file.flush()
            os.fsync(file.fileno())
