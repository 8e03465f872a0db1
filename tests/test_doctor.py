"""The doctor: what it counts, what it shows to people, and that the command behaves."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from studytiny import UserError
from train import sources
from train.corpus import PROBLEMS, is_held_out
from train.doctor import cover, describe, examine, length_classes

SICK = """开头的话
Ｅ
M 你好
M你好呀
E
M 一句
M
M 三
M 四
E
M 文字里有 <|end|>
接着写
M 好\x00的
E
M 没有回答
E
M 一
M 二
M 三
E
M 你好
M 你好呀
E
M 傻逼
M 嗯\u200b嗯
"""


@pytest.fixture
def sick(tmp_path):
    path = tmp_path / "sick.conv"
    path.write_text(SICK, encoding="utf-8")
    return path


def run(*arguments):
    command = [sys.executable, "-m", "train.corpus", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", cwd=Path(__file__).parents[1], timeout=120)


def test_every_problem_is_counted_with_its_lines(sick):
    problems = {kind: problem.lines for kind, problem in examine(sick).problems.items()}
    assert problems == {
        "empty_turn": [7],
        "odd_turns": [19],
        "single_turn": [15],
        "continuation": [12],
        "stray_line": [1],
        "missing_space": [4],
        "full_width_mark": [2],
        "control_character": [13],
        "invisible_character": [25],
        "special_token": [11],
    }


def test_the_text_for_people_names_every_problem_and_line_and_shows_no_rude_word(sick):
    text = describe(examine(sick, cleaning=True))
    for kind, problem in examine(sick).problems.items():
        assert f"{PROBLEMS[kind]}：1 处，第 {problem.lines[0]} 行" in text
    assert "编码：UTF-8" in text
    assert "含脏话的对话：1 段（20.0%）" in text
    assert "傻逼" not in text
    assert "\x00" not in text


def test_nothing_is_lost_in_the_count(sick):
    report = examine(sick)
    assert (report.found.dialogues, report.found.turns) == (7, 16)
    assert (report.usable.dialogues, report.usable.turns) == (5, 10)
    assert report.training.turns + report.held_out.turns == report.usable.turns
    assert report.training.characters + report.held_out.characters == report.usable.characters
    assert report.dialogue_turns == {1: 1, 2: 4, 3: 1, 4: 1}
    assert sum(report.turn_lengths.values()) == 16
    assert sum(report.reply_lengths.values()) == 5
    assert report.duplicate_dialogues == 1
    assert report.frequent_replies["你好呀"] == 2
    assert report.rude_dialogues == 1


def test_what_training_would_use_is_the_designs_split(tmp_path):
    turns = [(f"第{i}句", "好") for i in range(500)]
    (tmp_path / "a.conv").write_text("".join(f"E\nM {a}\nM {b}\n" for a, b in turns), encoding="utf-8")
    report = examine(tmp_path / "a.conv")
    assert report.held_out.dialogues == sum(map(is_held_out, turns)) > 0
    assert report.training.dialogues == 500 - report.held_out.dialogues


def test_vocabulary_coverage(tmp_path):
    (tmp_path / "a.conv").write_text("E\nM " + "好" * 989 + "\nM " + "的" * 10 + "罕\n", encoding="utf-8")
    vocabulary = examine(tmp_path / "a.conv").vocabulary
    assert (vocabulary.characters, vocabulary.cover_99, vocabulary.cover_999) == (3, 2, 2)
    assert (vocabulary.rare, vocabulary.rare_examples) == (1, "罕")
    assert cover(Counter(), 0.99) == 0


def test_length_classes():
    assert length_classes({1: 2, 3: 1, 4: 1, 12: 5, 60: 1}) == {
        **{"1": 2, "2": 0, "3-4": 2, "5-9": 0, "10-19": 5, "20-49": 0, "50-99": 1}
    }
    assert length_classes({9999: 1}) == {"200+": 1}
    assert length_classes({}) == {}


def test_rude_replies_are_not_among_the_examples(tmp_path):
    text = "".join(f"E\nM 问{i}\nM 你傻逼\n" for i in range(9)) + "E\nM 一\nM 好\n"
    (tmp_path / "a.conv").write_text(text, encoding="utf-8")
    assert list(examine(tmp_path / "a.conv").frequent_replies) == ["好"]


def test_a_file_of_nothing_but_problems_gives_a_short_report(tmp_path):
    (tmp_path / "a.conv").write_text("E\nM一\nM二\n" * 5000, encoding="utf-8")
    report = examine(tmp_path / "a.conv")
    assert report.problems["missing_space"].count == 10_000
    assert len(report.problems["missing_space"].lines) == 1000
    assert len(describe(report)) < 5000


def test_a_line_of_a_megabyte_is_examined(tmp_path):
    (tmp_path / "a.conv").write_text("E\nM " + "你好吗，" * 90_000 + "\nM 好\n", encoding="utf-8")
    report = examine(tmp_path / "a.conv", cleaning=True)
    assert report.turn_lengths["200+"] == 1
    assert len(describe(report)) < 5000


@pytest.mark.parametrize("content", ["", "E\nE\n", "没有标记的小说。\n第二行。", "E\nM\nM\n"])
def test_a_file_with_nothing_to_learn_is_still_described(tmp_path, content):
    (tmp_path / "a.conv").write_text(content, encoding="utf-8")
    report = examine(tmp_path / "a.conv", cleaning=True)
    assert report.training.dialogues == 0
    assert "训练：0 段对话" in describe(report)
    assert json.loads(json.dumps(report.as_json()))["training"]["dialogues"] == 0


def test_a_corpus_is_examined_by_name_unless_there_is_such_a_file(tmp_path, monkeypatch):
    monkeypatch.setitem(sources.OWN, "demo", 50)
    monkeypatch.chdir(tmp_path)
    report = examine("demo")
    assert (report.found.dialogues, report.encoding) == (50, "")
    assert "编码：无" in describe(report)
    Path("demo").write_text("E\nM 一\nM 二\n", encoding="utf-8")
    assert examine("demo").found.dialogues == 1


def test_missing_file_is_said(tmp_path):
    with pytest.raises(UserError, match="找不到语料文件"):
        examine(tmp_path / "none.conv")


def test_the_command_prints_one_json_object_and_nothing_else(sick):
    result = run(sick, "--json", "--clean")
    assert (result.returncode, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert report["problems"]["empty_turn"] == {"count": 1, "lines": [7]}
    assert report["rude_rate"] == report["duplicate_rate"] == 0.2
    assert report["cleaning"][0]["name"] == "normalise"


def test_the_command_describes_and_then_says_that_nothing_can_be_learnt(tmp_path):
    (tmp_path / "a.conv").write_text("没有标记的小说。\n", encoding="utf-8")
    result = run(tmp_path / "a.conv")
    assert result.returncode == 2
    assert "对话开始前没有 M 的行（略过）：1 处，第 1 行" in result.stdout
    assert result.stderr.startswith("错误：") and result.stderr.count("\n") == 1
