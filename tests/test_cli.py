"""What all mains share: arguments, exit codes, where output goes, levels and progress."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from common import cli
from common.commit import LockHeld
from common.config import ConfigError, StageSettings, UserError, load_settings
from common.progress import Progress
from tests.stage_runner import own_logging


class Settings(StageSettings):
    value: int = 1


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("train:\n  value: 3\n", encoding="utf-8")
    return path


def call(config: Path, run, *arguments: str, check=lambda settings: {"rows": 5}, **options):
    """Exit code, stdout and stderr of one main."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with own_logging(), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        argv = ["--config", str(config), *arguments]
        code = cli.main(Settings, run, doc="Doc.", section="train", check=check, argv=argv, **options)
    return code, stdout.getvalue(), stderr.getvalue()


def raising(problem: BaseException):
    def run(settings, *, overwrite=False):
        raise problem

    return run


def test_path_is_the_last_line_on_stdout(config):
    code, stdout, stderr = call(config, lambda settings, overwrite: Path("runs/out"))
    assert (code, stdout, stderr) == (0, "runs/out\n", "")


def test_dict_is_one_json_line_on_stdout(config):
    code, stdout, _ = call(
        config, lambda settings, overwrite: {"name": "счёт", "path": Path("a"), "value": settings.value}
    )
    assert code == 0 and stdout.count("\n") == 1
    assert json.loads(stdout) == {"name": "счёт", "path": "a", "value": 3}
    assert "счёт" in stdout


def test_overwrite_reaches_run(config):
    seen = []
    call(config, lambda settings, overwrite: seen.append(overwrite) or "x")
    call(config, lambda settings, overwrite: seen.append(overwrite) or "x", "--overwrite")
    assert seen == [False, True]


@pytest.mark.parametrize("arguments", [["--overwrite", "train.value=7"], ["train.value=7", "--overwrite"]])
def test_overrides_anywhere_among_the_options(config, arguments):
    code, stdout, _ = call(config, lambda settings, overwrite: {"value": settings.value}, *arguments)
    assert code == 0 and json.loads(stdout) == {"value": 7}


def test_own_arguments_reach_run_and_may_be_overrides(config):
    def add_arguments(parser):
        parser.add_argument("--plan", action="store_true")
        parser.add_argument("--value", dest="overrides", action="append", type=lambda text: f"train.value={text}")

    code, stdout, _ = call(
        config,
        lambda settings, overwrite, plan: {"value": settings.value, "plan": plan},
        "--plan",
        "--value",
        "9",
        add_arguments=add_arguments,
    )
    assert code == 0 and json.loads(stdout) == {"value": 9, "plan": True}


@pytest.mark.parametrize(
    ("problem", "code", "said"),
    [
        (UserError("input a is missing; give b"), 1, "error: input a is missing; give b\n"),
        (ConfigError("config c: wrong"), 2, "error: config c: wrong\n"),
        (LockHeld("output o is being written by pid 3"), 75, "error: output o is being written by pid 3\n"),
        (KeyboardInterrupt(), 130, "error: interrupted; start the same command again to go on where it stopped\n"),
    ],
)
def test_exit_codes(config, problem, code, said):
    assert call(config, raising(problem)) == (code, "", said)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EFBIG, errno.EDQUOT])
def test_what_the_system_refuses_is_an_error_with_the_path(config, number):
    code, stdout, stderr = call(config, raising(OSError(number, "refused", "runs/out/part-00000.parquet")))
    assert (code, stdout) == (1, "")
    assert stderr.startswith("error: runs/out/part-00000.parquet: ")


@pytest.mark.parametrize("bug", [ValueError("a bug"), OSError(errno.EBADF, "bad descriptor"), AssertionError()])
def test_a_bug_keeps_its_traceback(config, bug):
    with pytest.raises(type(bug)):
        call(config, raising(bug))


def test_wrong_arguments_are_code_2(config, capsys):
    for arguments in ([], ["--config", str(config), "--no-such-option"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(Settings, raising(AssertionError()), doc="", section="train", check=dict, argv=arguments)
        assert ended.value.code == 2
    assert "no-such-option" in capsys.readouterr().err
    code, _, stderr = call(config, raising(AssertionError()), "train.valu=3")
    assert code == 2 and "did you mean 'value'?" in stderr


def test_help_shows_the_docstring(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(Settings, raising(AssertionError()), doc="Reads this.", section="train", check=dict, argv=["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "Reads this." in shown
    assert "the section of this script is `train`" in shown and "explains every key" in shown


def test_check_prints_the_plan_and_does_not_run(config):
    code, stdout, _ = call(config, raising(AssertionError()), "--check")
    assert code == 0 and json.loads(stdout) == {"rows": 5}


def test_print_config_is_a_config(config, tmp_path):
    code, stdout, _ = call(config, raising(AssertionError()), "--print-config", "train.log_level=debug")
    assert code == 0
    saved = tmp_path / "saved.yaml"
    saved.write_text(stdout, encoding="utf-8")
    loaded = load_settings(saved, Settings, section="train")
    assert (loaded.value, loaded.log_level) == (3, "debug")
    assert yaml.safe_load(stdout)["engine"]["n_jobs"] == 1


def test_log_level_is_obeyed_and_libraries_stay_at_warnings(config):
    def run(settings, overwrite):
        for name in ("common.stage", "somebody.else"):
            for level in (logging.DEBUG, logging.INFO, logging.WARNING):
                logging.getLogger(name).log(level, "%s at %s", name, logging.getLevelName(level))
        return "done"

    at_info = call(config, run)[2]
    assert "common.stage at INFO" in at_info and "common.stage at DEBUG" not in at_info
    assert "somebody.else at WARNING" in at_info and "somebody.else at INFO" not in at_info
    assert "common.stage at DEBUG" in call(config, run, "train.log_level=debug")[2]
    assert "INFO" not in call(config, run, "train.log_level=warning")[2]


def test_progress_away_from_a_terminal_is_a_line_now_and_then(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    with Progress(100, label="embed") as progress:
        progress.update(40)
    assert caplog.messages == []  # nothing was slow
    monkeypatch.setattr(Progress, "_SECONDS_BETWEEN_LINES", -1.0)
    with Progress(2000, label="embed", done=1000) as progress:
        progress.update(500)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("embed: 1,500 of 2,000 rows, ")
    assert caplog.messages[0].endswith(" s left")
    with Progress(100, label="embed", enabled=False) as progress:
        progress.update(40)
    assert len(caplog.messages) == 1


def test_main_as_a_process_gives_its_code_to_the_shell(tmp_path, repository):
    command = [sys.executable, str(repository / "cluster_train_clusters.py")]
    ended = subprocess.run([*command, "--config", "absent.yaml"], capture_output=True, text=True, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: config absent.yaml does not exist; give --config FILE\n"
