"""The original README's four snippets, as our README shows them, run one after the other as a user would paste them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from published_factory import write_published

from studytiny.checkpoint import load_folder

ROOT = Path(__file__).parent.parent


def migration_snippets() -> list[str]:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## 从 StudyGPT 迁移")[1]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def run(tmp_path):
    """Runs a script in an empty folder, as a user of the original would."""
    (tmp_path / "data").mkdir()

    def run_script(script: str, answers: str = "") -> str:
        (tmp_path / "script.py").write_text(script, encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
        command = [sys.executable, "script.py"]
        result = subprocess.run(command, cwd=tmp_path, input=answers.encode(), capture_output=True, env=environment)
        assert result.returncode == 0, result.stderr.decode("utf-8", "replace")
        return result.stdout.decode("utf-8")

    return run_script


def test_chat_loop_and_generation_options_run_on_the_published_file(run, tmp_path):
    imports, chat, _, options, _ = migration_snippets()
    fixture = write_published(tmp_path / "published")
    fixture.checkpoint.rename(tmp_path / "data" / "model_epoch_2.pt")
    fixture.vocab.rename(tmp_path / "vocab.txt")
    output = run(imports + chat + options, "你好\n再见\nBye\n")
    assert output.count("您:") == 3
    assert output.count("AI: ") == 2


def test_training_and_its_options_run_on_a_conv_file(run, tmp_path):
    imports, _, training, _, options = migration_snippets()
    turns = "".join(f"E\nM 第{i}个问题\nM 第{i}个回答\n" for i in range(60))
    (tmp_path / "data" / "your_data.conv").write_text(turns, encoding="utf-8")
    output = run(imports + training + options)
    assert "损失" in output
    for out in ("studytiny", "second"):
        model, tokenizer = load_folder(tmp_path / "runs" / out, "cpu")
        assert (model.config.d_model, model.config.n_layers) == (512, 4)
        assert tokenizer.vocab_size == model.config.vocab_size
    assert (tmp_path / "vocab.txt").exists()
