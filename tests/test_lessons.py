"""The lessons: each runs as its page says, and what it teaches is so; and the tab that shows them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import gradio as gr
import pytest

from studytiny.web.lessons_tab import Lessons, read_lessons
from tests.browser import offline_environment

ROOT = Path(__file__).parent.parent
ALL = read_lessons()
NAMES = [lesson.name for lesson in ALL]


def run(name: str, home: Path) -> str:
    """What a lesson prints."""
    environment = {**offline_environment(home), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-m", f"lessons.{name}"], cwd=ROOT, env=environment, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    return done.stdout.decode("utf-8")


def test_characters_become_ids_and_nobody_types_a_mark(tmp_path: Path) -> None:
    said = run("1_characters", tmp_path)
    assert "变回来是 我叫小明，你呢？" in said and "<|assistant|>" in said
    typed, mark = re.search(r"打出来的 <\|end\|>：\[(.*)\]，真正的记号是 (\d+) 号", said).groups()
    assert len(typed.split(",")) == len("<|end|>") and mark not in typed.split(", ")


def test_the_chances_of_all_characters_add_up(tmp_path: Path) -> None:
    said = run("2_next_character", tmp_path)
    for block in said.strip().split("\n\n"):
        assert sum(map(float, re.findall(r"概率 +([\d.]+)%", block))) + float(
            re.search(r"加起来 ([\d.]+)%", block)[1]
        ) == pytest.approx(100, abs=0.5)


def test_each_slider_changes_how_many_characters_are_drawn(tmp_path: Path) -> None:
    plain, cold, hot, top_k, top_p, _ = map(int, re.findall(r"抽到过 (\d+) 种字", run("3_choosing", tmp_path)))
    assert cold <= plain < hot and top_k <= 3 and top_p <= plain


def test_our_model_looks_back_and_the_original_cannot(tmp_path: Path) -> None:
    said = run("4_looking_back", tmp_path)
    assert max(map(int, re.findall(r"(\d+)%", said))) >= 30  # one head at least looks for the name
    ours, original = map(float, re.findall(r"：([\d.]+)$", said, re.MULTILINE))
    assert ours > 1 and original == 0


def test_the_loop_writes_what_the_generator_writes(tmp_path: Path) -> None:
    said = run("5_whole_reply", tmp_path)
    assert said.rstrip().endswith("（一样）")
    assert "小雨" in re.search(r"用户：我叫什么名字？\n模型：(.*)", said)[1]  # without the first two turns it cannot
    assert len(re.findall(r"^  \S", said, re.MULTILINE)) == 4  # other beginnings


def test_the_loss_falls_and_what_was_learnt_is_known_by_heart(tmp_path: Path) -> None:
    said = run("6_learning", tmp_path)
    losses = list(map(float, re.findall(r"损失 ([\d.]+)", said)))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.3
    assert said.rstrip().endswith("草是什么颜色的？ → 晴天的时候是蓝色的。")


def test_every_lesson_has_a_title_in_both_languages_and_names_its_code() -> None:
    assert [int(name.split("_")[0]) for name in NAMES] == list(range(1, len(NAMES) + 1))
    for lesson in ALL:
        assert lesson.title("zh").startswith("第 ") and lesson.title("en").startswith("Lesson ")
        named = re.findall(r"`((?:studytiny|train)/\w+\.py)`", lesson.text)
        assert named and all((ROOT / name).is_file() for name in named)
        assert "**试一试**" in lesson.text and "def main()" in lesson.code and '"""#' not in lesson.code


def test_a_button_opens_its_lesson_and_nonsense_changes_nothing() -> None:
    lessons = Lessons()
    tabs, index, shown = lessons.open("zh", 3)
    assert (tabs.selected, index) == ("lessons", 3)
    assert ALL[3].text in shown and ALL[3].code in shown and f"python -m lessons.{NAMES[3]}\n" in shown
    for wrong in (len(ALL), -1, True, "1", None, 0.0):
        assert lessons.show("zh", wrong) == gr.skip()


def test_without_lessons_nothing_leads_to_them(tmp_path: Path) -> None:
    lessons = Lessons(read_lessons(tmp_path))
    with gr.Blocks() as page:
        lessons.link(1)
    assert not [block for block in page.blocks.values() if isinstance(block, gr.Button)]
