"""What train.demo promises: the same corpus for the same seed, clean turns, and facts that are answered as told."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from studytiny.command import run_command
from train.demo import FOLDER, TopicError, compose_dialogues, generate, write_conv
from train.demo.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
RUDE = ("操你", "傻逼", "他妈", "妈的", "滚开", "滚蛋", "混蛋", "贱", "废物", "垃圾", "去死", "王八", "屁")


@pytest.fixture(scope="module")
def corpus():
    return compose_dialogues(8000, 0)


def broken_folder(tmp_path: Path, text: str) -> Path:
    shutil.copytree(FOLDER / "values", tmp_path / "values")
    (tmp_path / "topics").mkdir()
    (tmp_path / "topics" / "mine.txt").write_text(text, encoding="utf-8")
    return tmp_path


def test_same_seed_same_dialogues_also_in_another_process():
    code = "import hashlib, train.demo as d; print(hashlib.sha1(repr(d.generate(300, 7)).encode()).hexdigest())"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert other.stdout.decode().strip() == hashlib.sha1(repr(generate(300, 7)).encode()).hexdigest()
    assert generate(50, 7) == generate(50, 7) != generate(50, 8)


def test_every_dialogue_has_the_promised_shape(corpus):
    assert len(corpus) == 8000
    for dialogue in corpus:
        assert 2 <= len(dialogue.turns) <= 16 and len(dialogue.turns) % 2 == 0
        assert sum(len(turn) + 2 for turn in dialogue.turns) < 256
        for turn in dialogue.turns:
            assert turn and turn == turn.strip() and "\n" not in turn


def test_no_slot_and_no_choice_is_left_unfilled(corpus):
    for dialogue in corpus:
        assert not re.search(r"[{}|@<>()]", "".join(dialogue.turns)), dialogue.turns


def test_a_told_fact_is_answered_with_its_latest_value(corpus):
    from_afar = 0
    for dialogue in corpus:
        for at, fact in dialogue.recalled:
            turn, value = [(turn, value) for turn, name, value in dialogue.told if name == fact and turn < at][-1]
            assert value in dialogue.turns[turn] and value in dialogue.turns[at], (fact, dialogue.turns)
            from_afar += at - turn > 1
    assert from_afar > 2500


def test_a_fact_never_told_is_not_made_up(corpus):
    unknown = "你还没告诉我你的名字呢。"
    replies = [(d, at) for d in corpus for at, turn in enumerate(d.turns) if turn == unknown]
    assert replies
    for dialogue, at in replies:
        assert not [fact for turn, fact, _ in dialogue.told if fact == "name" and turn < at], dialogue.turns


def test_no_rude_word_is_printed(corpus):
    for dialogue in corpus:
        assert not [word for word in RUDE if word in "".join(dialogue.turns)], dialogue.turns


def test_dialogues_hardly_repeat_and_open_in_many_ways(corpus):
    assert len({tuple(dialogue.turns) for dialogue in corpus}) > 0.97 * len(corpus)
    assert len({dialogue.turns[0] for dialogue in corpus}) > 2000


def test_nobody_is_told_goodbye_in_the_middle(corpus):
    for dialogue in corpus:
        for reply in dialogue.turns[1:-2:2]:
            assert not reply.startswith(("再见", "拜拜", "晚安")), dialogue.turns


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("@话题\n> 你好\n你好呀。\n", 3, "开头"),
        ("@话题\n> 你好\n\n> 早\n", 4, "回答"),
        ("@闲聊\n> 你好\n< 你好呀。\n", 1, "闲聊"),
        ("# 注释\n@话题\n> 你好\n< 我喜欢{nothing}。\n", 4, "nothing"),
        ("@话题\n> 你(好|您好\n< 你好呀。\n", 2, "括号"),
        ("@话题\n> 你好\n   < 你好呀。\n", 3, "缩进"),
        ("@话题 权重=多\n> 你好\n< 你好呀。\n", 1, "权重"),
        ("> 你好\n< 你好呀。\n", 1, "@"),
    ],
)
def test_a_broken_topic_file_is_named_with_its_line(tmp_path, text, line, what):
    with pytest.raises(TopicError) as caught:
        compose_dialogues(1, 0, broken_folder(tmp_path, text))
    message = str(caught.value)
    assert f"mine.txt 第 {line} 行" in message and what in message
    assert "\n" not in message and message.endswith("。")


def test_a_new_topic_needs_one_file_only(tmp_path):
    folder = broken_folder(tmp_path, "@话题\n> 我爱{hobby}\n< {hobby}好玩吗？\n  > 好玩\n  < 那就好。\n")
    dialogues = compose_dialogues(5, 0, folder)
    assert all(dialogue.turns for dialogue in dialogues)


def run_demo(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["train.demo", *arguments])
    run_command(main)


def test_the_file_has_the_conv_format(tmp_path, monkeypatch, capsys):
    out = tmp_path / "demo.conv"
    run_demo(monkeypatch, str(out), "--count", "20", "--seed", "3")
    expected = "".join("E\n" + "".join(f"M {turn}\n" for turn in turns) for turns in generate(20, 3))
    assert out.read_bytes() == expected.encode()
    assert "20 段对话" in capsys.readouterr().out


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    out = tmp_path / "demo.conv"
    out.write_text("旧的", encoding="utf-8")

    def interrupted():
        yield ["你好", "你好呀。"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_conv(out, interrupted())
    assert out.read_text(encoding="utf-8") == "旧的" and os.listdir(tmp_path) == ["demo.conv"]


@pytest.mark.parametrize("arguments", [["x.conv", "--count", "0"], ["x.conv", "--count", "many"], ["."], []])
def test_a_users_mistake_is_one_chinese_sentence(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        run_demo(monkeypatch, *arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("错误：") and error.count("\n") == 1 and not os.listdir(tmp_path)
