"""The report of a run: it says what is known and no more, and what a model said stays text."""

import json
import struct
import sys
from html.parser import HTMLParser

import pytest

from studytiny import UserError
from train import curve, report
from train.curve import plot, smooth
from train.report import RunFacts, read_facts, write_facts, write_report
from train.run_log import PROMPTS, RunLog

EVALUATION = {
    "bits_per_char": 2.905,
    "perplexity": 6.1,
    "dialogues": 1735,
    "characters": 20123,
    "unknown_rate": 0.003,
    "distinct_1": 0.21,
    "distinct_2": 0.56,
    "mean_reply_chars": 9.8,
    "repetition_rate": 0.015,
    "profanity_rate": 0.0,
    "seconds": 31.2,
}
OPEN = {"name": "demo", "license": "Apache-2.0", "dialogues": 40000, "training": 39200, "held_out": 800}
CLOSED = {"name": "my_talk|s.conv", "license": None, "dialogues": 10, "training": 9, "held_out": 1}


def make_facts(**changes):
    known = {
        "corpora": [OPEN],
        "cleaning": [],
        "vocabulary": 1024,
        "unknown_rate": None,
        "tokens": 345678,
        "labels": 123456,
        "parameters": 4_300_000,
        "settings": {"lr": 1e-3, "minutes": None, "half": False},
        "command": "python -m train --minutes 1",
        "machine": {"device": "cpu", "threads": 2},
        "preset": "mini",
        "evaluation": EVALUATION,
        "finished": True,
        "minutes": 1.0,
    }
    return RunFacts(**{**known, **changes})


def make_run(folder, facts=None, steps=(), bits=(), samples=()):
    log = RunLog(folder)
    for step in steps:
        numbers = {"loss": 1 + 5 / step, "learning_rate": 1e-3, "tokens_per_second": 3000.0}
        log.training(step=step, epoch=0, seconds=step, tokens=step, **numbers)
    for step, value in enumerate(bits, 1):
        log.measurement(step=step, epoch=0, seconds=step, bits_per_char=value)
    for stage, replies in samples:
        log.samples(step=10 * stage, stage=stage, replies=replies)
    log.close()
    write_facts(folder, facts or make_facts())
    return folder


def written(folder):
    return write_report(folder).read_text(encoding="utf-8")


class Elements(HTMLParser):
    """The tags of a text, and the text of each cell."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data):
        if self.cells and data != "\n":  # between rows
            self.cells[-1] += data


@pytest.fixture
def no_picture(monkeypatch):
    """Without matplotlib, for what is about words only: it is also faster."""
    for name in ("matplotlib", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)


def test_facts_are_read_as_they_were_written(tmp_path):
    facts = make_facts(corpora=[OPEN, CLOSED], unknown_rate=0.01)
    write_facts(tmp_path, facts)
    assert read_facts(tmp_path) == facts


def test_where_the_run_lay_on_this_machine_is_not_kept(tmp_path):
    write_facts(tmp_path, make_facts(settings={"lr": 1e-3, "out": "/home/somebody/run"}))
    assert "somebody" not in (tmp_path / report.RUN_FILE).read_text(encoding="utf-8")


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"preset": "mini"}', "\ufffd", "cut", "type", "rows"])
def test_damaged_facts_are_one_sentence(tmp_path, damage):
    path = write_facts(tmp_path, make_facts())
    content = path.read_text(encoding="utf-8")
    data = json.loads(content)
    changed = {
        "cut": content[: len(content) // 2],
        "type": json.dumps({**data, "tokens": "many"}),
        "rows": json.dumps({**data, "corpora": ["demo"]}),
    }
    path.write_text(changed.get(damage, damage), encoding="utf-8")
    with pytest.raises(UserError, match=r"run\.json") as caught:
        write_report(tmp_path)
    assert str(caught.value).count("。") == 1
    assert not (tmp_path / "README.md").exists()


def test_folder_of_no_run_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"没有 run\.json"):
        write_report(tmp_path)


def test_report_of_a_run_just_begun(tmp_path):
    text = written(make_run(tmp_path, make_facts(evaluation={}, finished=False, minutes=0.0)))
    assert "还没有训练完" in text
    assert "还没有训练记录" in text
    assert "curve.png" not in text
    assert "| 比特/字 | 未测 |" in text
    assert text.count("未测") == len(report.MEASURES)
    assert "<table>" not in text
    with pytest.raises(UserError, match="还没有训练记录"):
        plot(tmp_path)


def test_report_without_matplotlib_says_how_to_get_the_picture(tmp_path, no_picture):
    text = written(make_run(tmp_path, steps=[1, 2], bits=[4.0]))
    assert "pip install matplotlib" in text
    assert "](curve.png)" not in text
    assert not (tmp_path / "curve.png").exists()


@pytest.mark.parametrize("steps", [[1], range(1, 100)])
def test_the_picture_is_a_picture(tmp_path, steps):
    text = written(make_run(tmp_path, steps=steps, bits=[4.0] if len(steps) > 1 else []))
    assert "](curve.png)" in text
    content = (tmp_path / "curve.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert 1200 <= width <= 2000
    assert 600 <= height <= 1400
    image = pytest.importorskip("PIL.Image")
    with image.open(tmp_path / "curve.png") as picture:
        colours = picture.convert("RGB").getcolors(1 << 20)
    assert max(colours)[1] == (255, 255, 255)
    assert len(colours) > 50  # something is drawn on the white


def test_labels_are_chinese_only_with_a_font_that_has_them(monkeypatch):
    from matplotlib import font_manager

    latin = font_manager.findfont("DejaVu Sans")  # comes with matplotlib

    def listed(path):
        entry = font_manager.FontEntry(fname=str(path), name=curve.CHINESE_FONTS[0])
        monkeypatch.setattr(font_manager.fontManager, "ttflist", [entry])
        return curve.chinese_font()

    # One that only bears the name has no Chinese characters, and one that was removed cannot be opened.
    assert listed(latin) is None
    assert listed("/nowhere/font.ttf") is None
    monkeypatch.setattr(curve, "LABELS", {"rate": ("abc", "abc")})
    assert listed(latin) == latin


def test_smoothing_keeps_length_and_level():
    assert smooth([]) == []
    assert smooth([3.0]) == [3.0]
    assert smooth([2.0] * 500) == [2.0] * 500
    noisy = [float(i % 2) for i in range(1000)]
    assert all(0.4 < value < 0.6 for value in smooth(noisy)[100:])


HOSTILE = [
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "</td></tr></table>\n\n# 标题\n\n| a | b |",
    "**粗** `码` [链](http://example.com) ![](http://example.com/x.png) &lt;b&gt;",
    "a\r\nb\x85c\u2028d\x00e",
    "",
]


def test_what_a_model_said_stays_text(tmp_path, no_picture):
    prompts = PROMPTS[: len(HOSTILE)]
    replies = list(zip(prompts, HOSTILE, strict=True))
    text = written(make_run(tmp_path, steps=[1], samples=[(1, replies), (3, [(prompts[0], "你好")])]))
    table = text[text.index("<table>") : text.index("</table>") + len("</table>")]
    assert "\n\n" not in table  # a blank line would end the HTML, and Markdown would come alive
    found = Elements(table)
    assert found.tags == {"table", "tr", "th", "td", "br", "i"}
    rows = [found.cells[i : i + 4] for i in range(0, len(found.cells), 4)]
    assert [row[0] for row in rows] == list(prompts)
    assert rows[0][1:] == [HOSTILE[0], "—", "你好"]
    assert rows[2][1] == HOSTILE[2]
    assert rows[3][1] == "abcde"
    assert rows[4][1] == "（什么也没说）"
    assert "<script" not in text
    assert Elements(text.replace(table, "")).tags == set()


def test_names_of_others_do_not_break_the_tables(tmp_path, no_picture):
    corpus = {**CLOSED, "name": "<b>a|b</b>\n# *c*", "license": "`x` | [y](z)"}
    cleaning = [{"name": "rude", "title": "去掉|脏话", "changed": 5, "turns_before": 9}]
    text = written(make_run(tmp_path, make_facts(corpora=[corpus], cleaning=cleaning)))
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert {line.count("|") for line in lines} <= {3, 4, 6, 7}
    assert r"| &lt;b&gt;a&#124;b&lt;/b&gt; \# \*c\* | \`x\` &#124; \[y\](z) | 10 | 9 | 1 |" in lines
    assert "| rude | 去掉&#124;脏话 | 5 | 未测 → 未测 | 9 → 未测 | 未测 → 未测 |" in lines


def test_numbers_are_those_measured(tmp_path, no_picture):
    text = written(make_run(tmp_path, steps=[1, 2, 2500], bits=[5.0, 3.0, 3.5]))
    assert "| 比特/字 | 2.905 |" in text
    assert "| 车轱辘话 | 1.5% |" in text
    assert "第一次 5.000 比特/字，最近一次 3.500；最好的一次 3.000" in text
    assert "1.0 分钟，2,500 步" in text
    assert "1,024 项词表里闭着眼乱猜，是 10.00 比特/字" in text
    assert "Held-out bits per character: 2.905." in text


@pytest.mark.parametrize(
    ("corpora", "licence", "warned"),
    [
        ([OPEN], "license: apache-2.0\n", False),
        ([OPEN, {**OPEN, "license": "MIT"}], "license: other\n", False),
        ([OPEN, CLOSED], "license: other\n", True),
        ([], "license: other\n", False),
    ],
)
def test_model_without_an_open_licence_is_not_offered_as_open(tmp_path, no_picture, corpora, licence, warned):
    text = written(make_run(tmp_path, make_facts(corpora=corpora)))
    header = text.split("---\n")[1]
    assert licence in header
    assert "pipeline_tag: text-generation\n" in header
    assert ("请不要上传、公开或转送" in text) is warned
    assert ("do not publish" in text) is warned


def test_absolute_path_of_the_folder_is_not_told(tmp_path, no_picture, monkeypatch):
    folder = make_run(tmp_path / "my run")
    text = written(folder)
    assert str(tmp_path) not in text
    assert 'python -m studytiny.chat --model "my run"' in text
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my run").rename(tmp_path / "run")
    assert "python -m train --resume --out run\n" in (write_report("run")).read_text(encoding="utf-8")


def test_command_writes_the_report_again(tmp_path, no_picture, monkeypatch, capsys):
    make_run(tmp_path, steps=[1])
    monkeypatch.setattr(sys, "argv", ["train.report", str(tmp_path)])
    report.main()
    assert "README.md" in capsys.readouterr().out
    assert (tmp_path / "README.md").read_bytes().count(b"\r") == 0
    monkeypatch.setattr(sys, "argv", ["train.report", "--help"])
    with pytest.raises(SystemExit):
        report.main()
    assert "模型文件夹" in capsys.readouterr().out
