"""What train.probes promises: probes that cannot have been learnt by heart, and a score that means what it says."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from studytiny import SamplingConfig, UserError, save_checkpoint
from studytiny.command import run_command
from train.demo import FOLDER as DEMO
from train.demo import generate
from train.demo.topics import load_book
from train.evaluate import main, show
from train.probes import (
    FOLDER,
    Answer,
    Probe,
    deal,
    describe,
    load_probes,
    make_probes,
    measure_probes,
    read_lines,
    read_templates,
    read_values,
    run_probes,
    summary,
)


def as_pattern(text: str) -> str:
    """A line of topics or values as a regular expression; {slots} become <slots>."""
    pattern = re.sub(r"[.^$*+?\[\]\\{}]", lambda match: "\\" + match[0], text).replace("(", "(?:")
    return re.sub(r"\\\{([a-z_]+)\d?\\\}", r"<\1>", pattern)


def bare(text: str) -> str:
    """As a hurried user may type it: no punctuation."""
    return re.sub(r"[，。？！!?～\s]", "", text)


@pytest.fixture(scope="module")
def probes() -> list[Probe]:
    return load_probes()


@pytest.fixture(scope="module")
def user_turns() -> set[str]:
    return {bare(turn) for turns in generate(20000, 5) for turn in turns[::2]}


def test_every_kind_has_twenty_probes_and_the_seed_makes_them(probes):
    kinds = Counter(probe.kind for probe in probes)
    assert len(kinds) == 19 and min(kinds.values()) >= 20 and 400 <= len(probes) <= 500
    assert probes == load_probes() != load_probes(1)
    assert len(set(probes)) > 0.97 * len(probes)


def test_no_value_is_one_of_the_training_values():
    banned = load_book(DEMO).banned  # what no slot takes, also where it is composed of characters
    taken = []
    for slot, forms in read_values().items():
        assert {form[0] for form in forms} <= banned
        path = DEMO / "values" / f"{slot}.txt"
        lines = [line for line in read_lines(path) if "{" not in line] if path.exists() else []
        training = re.compile("|".join(f"(?:{as_pattern(line)})" for line in lines) or "(?!)")
        taken += [(slot, form[0]) for form in forms if training.fullmatch(form[0])]
    assert taken == []


def test_no_character_of_a_value_is_new_to_the_training_text():
    files = [*(DEMO / "topics").glob("*.txt"), *(DEMO / "values").glob("*.txt")]
    known = set("".join(path.read_text(encoding="utf-8") for path in files)) | set("0123456789")
    values = {form[0] for slot, forms in read_values().items() if slot != "unknown" for form in forms}
    assert [value for value in sorted(values) if set(value) - known] == []


def test_no_turn_and_no_value_occurs_in_twenty_thousand_training_dialogues(probes, user_turns):
    turns = {bare(turn) for probe in probes for turn in probe.turns}
    assert sorted(turns & user_turns) == []
    text = "\n".join(user_turns)
    names = [form[0] for slot in ("name", "friend", "petname") for form in read_values()[slot]]
    assert [name for name in names if f"叫{name}" in text] == []


def test_no_wording_is_a_training_wording():
    lines = [line for path in (DEMO / "topics").glob("*.txt") for line in read_lines(path)]
    users = [bare(line.strip()[1:]) for line in lines if line.lstrip().startswith(">")]
    training = [re.compile(as_pattern(text)) for text in users]
    wordings = {
        re.sub(r"\{([a-z_]+)\d?\}", r"<\1>", bare(wording))
        for path in FOLDER.glob("*.txt")
        for line in read_lines(path)
        if line.startswith(">")
        for wording in line[1:].strip().split("|")
    }
    wordings -= {wording for wording in wordings if re.fullmatch("<[a-z_]+>岁?", wording)}  # a value alone
    assert len(wordings) > 200
    assert sorted(wording for wording in wordings if any(pattern.fullmatch(wording) for pattern in training)) == []


def test_what_is_wanted_is_never_forbidden(probes):
    for probe in probes:
        told = " ".join(probe.turns)
        for group in probe.wanted:
            assert any(not any(bad in good for bad in probe.forbidden) for good in group), probe
        assert probe.wanted and "{" not in told, probe


def test_there_are_three_hundred_first_messages():
    messages = read_lines(FOLDER / "first_messages.txt")
    assert len(messages) == len(set(messages)) == 300


def values_of(probe: Probe) -> list[str]:
    return [group[0] for group in probe.wanted]


def test_a_model_that_is_always_right_scores_100_percent(probes):
    right = {probe.turns: probe for probe in probes}

    def answerer(messages, sampling):
        said = tuple(message["content"] for message in messages[::2])
        if said not in right:
            return f"第{len(said)}句我听见了。"
        return "".join(values_of(right[said])).replace("{reply}", f"第{len(said) - 1}句我听见了")

    result = summary(run_probes(answerer, probes, SamplingConfig()))
    assert result["total"] == 1 and set(result["kinds"].values()) == {1.0}


def test_a_parrot_of_the_first_message_scores_0_on_corrections(probes):
    def parrot(messages, sampling):
        return messages[0]["content"]

    answers = run_probes(parrot, [probe for probe in probes if probe.kind == "改口"], SamplingConfig())
    assert len(answers) >= 20 and summary(answers)["total"] == 0
    both = run_probes(
        lambda messages, sampling: " ".join(m["content"] for m in messages), [answers[0].probe] * 2, SamplingConfig()
    )
    assert summary(both)["total"] == 0  # the new value with the old one is not enough


def test_empty_replies_are_always_wrong(probes):
    assert summary(run_probes(lambda messages, sampling: "", probes, SamplingConfig()))["total"] == 0


def test_replies_stay_in_the_history_and_every_turn_has_its_own_seed():
    seen = []

    def answerer(messages, sampling):
        seen.append((len(messages), [m["content"] for m in messages[1::2]], sampling.seed, sampling.temperature))
        return f"答{len(messages)}"

    probe = Probe("甲", ("一", "二", "三"), (("答5",),), ())
    assert run_probes(answerer, [probe], SamplingConfig(temperature=0), seed=2)[0].is_right
    assert seen == [(1, [], 200, 0), (3, ["答1"], 201, 0), (5, ["答1", "答3"], 202, 0)]


@pytest.mark.parametrize(
    ("wanted", "forbidden", "last", "right"),
    [
        ([["雨桐"]], [], "你叫雨桐呀。", True),
        ([["陈雨桐", "雨桐"]], ["小红"], "你叫雨桐，不叫小红。", False),
        ([["雨桐"], ["47", "四十七"]], [], "你是雨桐。", False),
        ([["雨桐"], ["47", "四十七"]], [], "雨桐，四十七岁。", True),
        ([["Carol"]], [], "你叫carol。", True),
        ([["{reply}"]], [], "我刚才说的是“很高兴认识你呀”。", True),
        ([["{reply}"]], [], "我不记得了。", False),
    ],
)
def test_what_counts_as_right(wanted, forbidden, last, right):
    probe = Probe("甲", ("一", "二"), tuple(map(tuple, wanted)), tuple(forbidden))
    assert Answer(probe, ("很高兴认识你呀。", last)).is_right is right


def test_wordings_values_and_distances_take_turns(tmp_path):
    from random import Random

    path = tmp_path / "mine.txt"
    path.write_text("@ 甲\n* 6\n> 我叫{name}|叫我{name}\n~ 0 2\n> 是{name2}吗\n= {name}\n! {name2}\n", encoding="utf-8")
    (template,) = read_templates(path, ["name"])
    names = [(f"名{i}", f"小{i}") for i in range(4)]
    made = make_probes(template, {"name": names}, ["嗯", "哦", "哈"], Random(0))
    assert Counter(probe.turns[0][:2] for probe in made) == {"我叫": 3, "叫我": 3}
    assert Counter(len(probe.turns) for probe in made) == {2: 3, 4: 3}
    for probe in made:
        assert probe.wanted[0] in names and probe.forbidden in names and probe.wanted[0] != probe.forbidden
        assert probe.wanted[0][0] in probe.turns[0] and probe.forbidden[0] in probe.turns[-1]
    dealt = deal("甲乙丙", Random(0))
    assert Counter(next(dealt) for _ in range(6)) == {"甲": 2, "乙": 2, "丙": 2}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("@ 甲\n* 2\n> 你好{other}\n= 好\n", 3),
        ("@ 甲\n* 2\n>> \n你好\n= 好\n", 4),
        ("@ 甲\n> 你好\n= 好\n", 4),
        ("@ 甲\n* 2\n> 你好\n~ 一\n= 好\n", 4),
        ("@ 甲\n* 2\n> 你好\n\n= 好\n", 4),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, text, line):
    path = tmp_path / "mine.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"mine.txt 第 {line} 行"):
        read_templates(path, ["name"])


@pytest.fixture
def few_probes(monkeypatch):
    monkeypatch.setattr("train.probes.load_probes", lambda seed, folder: [Probe("甲", ("你好",), (("好",),), ())] * 2)
    monkeypatch.setattr("train.probes.read_lines", lambda path: ["你好", "？" * 90])


@pytest.mark.parametrize("name", ["model", "published"])
def test_a_model_of_either_architecture_is_measured_the_same_way_twice(request, tokenizer, few_probes, name):
    model = request.getfixturevalue(name)
    result, answers, first = measure_probes(model, tokenizer)
    again, answers_again, _ = measure_probes(model, tokenizer)
    assert (answers, result["greedy"], result["first_messages"]) == (
        answers_again,
        again["greedy"],
        again["first_messages"],
    )
    assert result["first_messages"]["messages"] == 2 and set(result["sampled"]["kinds"]) == {"甲"}
    assert "合计" in describe(result) and "甲" in describe(result)
    assert "？" in show(first) and "应有 好" in show(answers)


def run_evaluate(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["train.evaluate", *arguments])
    run_command(main)


def test_the_command_prints_figures_replies_or_json(tmp_path, monkeypatch, capsys, model, tokenizer, few_probes):
    save_checkpoint(tmp_path, model, tokenizer)
    run_evaluate(monkeypatch, str(tmp_path), "--probes", "--show", "--json")
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["probes"] == 2 and {"total", "kinds", "worst"} == set(result["sampled"])
    assert {"mean_reply_chars", "repetition_rate", "empty_rate", "profanity_rate", "distinct_1", "distinct_2"} <= set(
        result["first_messages"]
    )
    assert "第一句话" in err
    run_evaluate(monkeypatch, str(tmp_path), "--probes")
    assert "默认抽样" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--probes", "--corpus", "x.conv"], ["--corpus", "x.conv", "--show"]])
def test_a_command_that_does_not_say_what_to_measure_is_told_so(monkeypatch, capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        run_evaluate(monkeypatch, "somewhere", *arguments)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.startswith("错误：") and "--probes" in error and error.count("\n") == 1


EVERYDAY = FOLDER.parent / "everyday"


def test_the_everyday_probes_are_a_second_exam_of_known_kinds(probes):
    everyday = load_probes(0, EVERYDAY)
    assert len(everyday) > 300 and {"爱好", "家乡", "是非吃的", "记错名字"} <= {probe.kind for probe in everyday}
    assert not {turn for probe in everyday for turn in probe.turns} & {turn for probe in probes for turn in probe.turns}
    assert all(any(form in "".join(probe.turns[:-1]) for form in probe.wanted[-1]) for probe in everyday)


def test_a_folder_without_probes_is_named(tmp_path, monkeypatch, capsys, model, tokenizer):
    save_checkpoint(tmp_path / "model", model, tokenizer)
    for written, missing in ((None, "fillers.txt"), ("fillers.txt", "考题")):
        if written:
            (tmp_path / written).write_text("下雨了\n", encoding="utf-8")
        with pytest.raises(SystemExit) as exit_:
            run_evaluate(monkeypatch, str(tmp_path / "model"), "--probes", str(tmp_path))
        assert exit_.value.code == 2
        assert f"{tmp_path} 里没有{missing}" in capsys.readouterr().err.replace("没有 ", "没有")
