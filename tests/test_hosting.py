"""The upload folder: what a host gets runs there as it is."""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from pathlib import Path

import pytest

from studytiny.command import run_command
from studytiny.hosting import CONTENT, is_hosted, main, write_upload_folder
from tests.browser import offline_environment, running_page


@pytest.mark.parametrize("host", ["space", "studio"])
def test_the_folder_holds_what_the_host_asks_for(tmp_path: Path, host: str) -> None:
    out = write_upload_folder(host, tmp_path / "up", "https://example.org/cpu")
    assert {path.name for path in out.iterdir()} >= {*CONTENT, "README.md", "requirements.txt"}
    _, head, body = (out / "README.md").read_text(encoding="utf-8").split("---\n")
    wanted = {"space": ["sdk: gradio", "app_file: app.py", "license: apache-2.0"], "studio": ["entry_file: app.py"]}
    assert all(line in head for line in wanted[host]) and "StudyTiny" in body
    needed = (out / "requirements.txt").read_text(encoding="utf-8")
    assert needed.startswith("--extra-index-url https://example.org/cpu\n")
    assert "torch>=" in needed and "gradio>=" in needed and "pytest" not in needed and "playwright" not in needed
    assert (out / "ms_deploy.json").exists() is (host == "studio")
    if host == "studio":
        assert json.loads((out / "ms_deploy.json").read_text(encoding="utf-8"))["sdk_type"] == "gradio"
    assert not [path for path in out.rglob("*") if path.name == "__pycache__" or path.stat().st_size > 10_000_000]


def test_what_was_written_runs_and_nobody_trains_there(tmp_path: Path) -> None:
    out = write_upload_folder("space", tmp_path / "up")
    environment = {**offline_environment(tmp_path), "SPACE_ID": "a/b", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    with running_page([sys.executable, "app.py"], environment, out) as address:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        config = opener.open(f"{address}config", timeout=10).read().decode("utf-8")
        assert "xray-reply" in config and "train-start" not in config and "lesson-text" in config
        assert "https://huggingface.co/spaces/a/b/tree/main" in config


def test_a_folder_that_is_not_empty_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("x", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["hosting", "space", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 2 and "已经有东西了" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["mine.txt"]
    monkeypatch.setattr("sys.argv", ["hosting", "studio", str(tmp_path / "new")])
    run_command(main)
    assert "写好了" in capsys.readouterr().out


def test_hosts_are_known_by_what_they_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SPACE_ID", "MODELSCOPE_ENVIRONMENT"):
        monkeypatch.delenv(name, raising=False)
    assert not is_hosted()
    monkeypatch.setenv("MODELSCOPE_ENVIRONMENT", "studio")
    assert is_hosted()
