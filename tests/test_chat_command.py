"""``python -m studytiny.chat``: a real process, fed through its standard input."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from studytiny import DialogueModel, Tokenizer, save_checkpoint
from studytiny.chat import YOU, build_parser, chat, main, speak
from studytiny.errors import UserError
from studytiny.generator import Generator, Reply, Step
from studytiny.safety import FILTER_VARIABLE, HELP
from studytiny.sampling import SamplingConfig
from tests.loopback_hub import REPOSITORY, LoopbackHub
from tests.published_factory import write_published


@pytest.fixture
def folder(tmp_path: Path, model: DialogueModel, tokenizer: Tokenizer) -> Path:
    return save_checkpoint(tmp_path / "model", model, tokenizer)


def run(*arguments: str, said: str | bytes = "", **options) -> subprocess.CompletedProcess[str]:
    process = subprocess.run(
        [sys.executable, "-m", "studytiny.chat", *arguments],
        input=said.encode("utf-8") if isinstance(said, str) else said,
        capture_output=True,
        cwd=REPOSITORY,
        timeout=120,
        **options,
    )
    process.stdout, process.stderr = process.stdout.decode("utf-8"), process.stderr.decode("utf-8")
    assert "Traceback" not in process.stderr
    return process


def test_piped_conversation(folder: Path) -> None:
    finished = run("--model", str(folder), "--max-new-tokens", "5", said="\ufeff你好\n\n你是谁\n")
    assert finished.returncode == 0
    assert finished.stdout.count("StudyTiny：") == 2
    assert finished.stdout.rstrip().endswith("再见！")
    assert str(folder) in finished.stdout and "studytiny 架构" in finished.stdout


def test_bytes_that_are_no_text_and_a_long_message_do_not_end_the_chat(folder: Path) -> None:
    said = b"\xff\xfe\n" + ("长" * 10_000).encode("utf-8") + "\n你好\n".encode()
    finished = run("--model", str(folder), "--max-new-tokens", "5", said=said)
    assert finished.returncode == 0
    assert "10000 个字" in finished.stderr
    assert finished.stdout.count("StudyTiny：") == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "没有这个"],
        ["--temperature", "x"],
        ["--temperature", "nan"],
        ["--top-k", "-1"],
        ["--seed", "1.5"],
        ["--nonsense"],
        ["--device", "cuda"] if not torch.cuda.is_available() else ["--device", "nowhere"],
    ],
)
def test_a_mistake_is_refused(arguments: list[str]) -> None:
    with pytest.raises(UserError):
        main(arguments)


def test_a_mistake_is_one_sentence_and_exit_code_2() -> None:
    finished = run("--model", "没有这个")
    assert finished.returncode == 2
    assert finished.stderr.startswith("错误：") and finished.stderr.count("\n") == 1


def test_without_network_the_bundled_model_stands_in_and_says_so(folder: Path, tmp_path: Path) -> None:
    with LoopbackHub({}) as hub:
        pass  # nobody listens there any more
    code = f"import sys, studytiny.hub as hub; from pathlib import Path; hub.BUNDLED_FOLDER = Path({str(folder)!r})\n"
    code += "from studytiny.chat import main; main(['--model', 'StudyTinyModel', '--max-new-tokens', '5'])"
    finished = subprocess.run(
        [sys.executable, "-c", code],
        input="你好\n".encode(),
        capture_output=True,
        env={**hub.environment(tmp_path), "PYTHONUTF8": "1"},
        timeout=120,
    )
    assert finished.returncode == 0
    assert "改用自带的小模型" in finished.stderr.decode("utf-8")
    assert "正在回答的是：自带小模型" in finished.stdout.decode("utf-8")


def test_study_tiny_model_is_fetched_and_answers(tmp_path: Path) -> None:
    published = write_published(tmp_path / "hub")
    files = {path.name: path.read_bytes() for path in (published.checkpoint, published.vocab)}
    with LoopbackHub(files) as hub:
        environment = {**hub.environment(tmp_path / "home"), "PYTHONUTF8": "1"}
        finished = run("--model", "StudyTinyModel", "--max-new-tokens", "5", said="你好\n", env=environment)
    assert finished.returncode == 0
    assert "published 架构" in finished.stdout and "StudyTiny：" in finished.stdout


class Recorder:
    """Stands in for a Generator: remembers what it was asked, and answers with ``texts`` in turn, or with the number
    of messages."""

    def __init__(self, *texts: str) -> None:
        self.asked: list[list[dict[str, str]]] = []
        self.texts = list(texts)

    def stream(self, messages, sampling, caller=""):
        self.asked.append(list(messages))
        return (Step(character, 7) for character in (self.texts.pop(0) if self.texts else str(len(messages))))


def answers(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """Lets ``input`` return or raise these, one after the other."""
    remaining = iter(lines)

    def read(prompt: str) -> str:
        assert prompt == YOU
        line = next(remaining)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


def test_earlier_turns_are_remembered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answers(monkeypatch, "你好", "你是谁", "bye")
    recorder = Recorder()
    chat(recorder, SamplingConfig())
    assert [turn["content"] for turn in recorder.asked[1]] == ["你好", "1", "你是谁"]
    assert "StudyTiny：3" in capsys.readouterr().out


def test_who_is_in_danger_is_answered_by_us(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(monkeypatch, "我不想活了", "bye")
    recorder = Recorder()
    chat(recorder, SamplingConfig())
    assert recorder.asked == [] and HELP[0] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("switch", "shown"),
    [("1", "StudyTiny：天气不错， ……（换一句）\nStudyTiny：下雨了\n"), ("0", "StudyTiny：天气不错，滚！\n")],
)
def test_a_rude_reply_is_broken_off_only_when_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], switch: str, shown: str
) -> None:
    monkeypatch.setenv(FILTER_VARIABLE, switch)
    reply = speak(Recorder("天气不错，滚！", "下雨了"), [{"role": "user", "content": "你好"}], SamplingConfig())
    assert capsys.readouterr().out == shown and shown.endswith(f"{reply}\n")


@pytest.mark.parametrize("end", ["exit", "QUIT", " Bye ", EOFError, KeyboardInterrupt])
def test_ways_to_leave(monkeypatch: pytest.MonkeyPatch, end: str | type[BaseException]) -> None:
    answers(monkeypatch, "你好", " ", end)
    recorder = Recorder()
    chat(recorder, SamplingConfig())
    assert len(recorder.asked) == 1


def test_ctrl_c_stops_a_reply_and_keeps_what_was_said(
    model: DialogueModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = Reply.__next__
    left = [3]

    def interrupted(reply: Reply) -> Step:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return read(reply)

    monkeypatch.setattr(Reply, "__next__", interrupted)
    said = speak(Generator(model, tokenizer), [{"role": "user", "content": "你好"}], SamplingConfig(seed=1))
    assert len(said) == 2
    assert "已停止" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGINT for one process")
def test_real_ctrl_c_at_the_prompt_ends_quietly(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "studytiny.chat", "--model", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=REPOSITORY,
    )
    shown = b""
    while YOU.encode() not in shown:
        shown += process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and errors == b""


def test_help_is_chinese() -> None:
    shown = build_parser().format_help()
    assert "用法：" in shown and "温度" in shown and "usage" not in shown
