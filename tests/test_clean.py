"""Cleaning: what each rule does and leaves, and that no rule moves a turn to the other speaker."""

import random
import re

import pytest

from studytiny import UserError
from studytiny.word_lists import RUDE_WORDS_FILE
from train import demo
from train.clean import RULES, clean, has_words, is_rude, normalise_text

NAMES = [rule.name for rule in RULES]


def only(name, dialogues):
    """What one rule alone makes of the dialogues."""
    return clean(dialogues, off=[other for other in NAMES if other != name], on=[name]).dialogues


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        (" 你\u3000\u3000好\t呀 ", "你 好 呀"),
        ("ＡＢｃ１２３", "ABc123"),
        ("好！！！！！！", "好！！！"),
        ("好！！", "好！！"),
        ("。。。。。。……", "。。。……"),
        ("…………", "……"),
        ("____", "___"),
        ("你\u200b好\ufeff", "你好"),
        ("👨\u200d👩", "👨\u200d👩"),
        ("哈哈哈哈哈哈 10000", "哈哈哈哈哈哈 10000"),
        ("你好，再见！", "你好，再见！"),
    ],
)
def test_one_way_of_writing(text, normal):
    assert normalise_text(text) == normal
    assert normalise_text(normal) == normal


@pytest.mark.parametrize(
    "text",
    [
        *"。？~",
        "=。=",
        "= =",
        "T_T",
        "^_^",
        "(≧▽≦)",
        "╮(╯▽╰)╭",
        "(＃｀皿´)ノ",
        "QAQ",
        "orz",
        "=w=",
        "😊",
        "o(╯□╰)o",
        "***",
    ],
)
def test_no_words(text):
    assert not has_words(text)


@pytest.mark.parametrize("text", ["好", "嗯 =。=", "1", "2.5", "ok", "A", "QQ", "hello T_T", "器皿", "😊好", "is"])
def test_words(text):
    assert has_words(text)


def test_every_rude_word_is_a_pattern_that_needs_a_character():
    lines = RUDE_WORDS_FILE.read_text(encoding="utf-8").splitlines()
    entries = [line for line in lines if line.strip() and not line.startswith("#")]
    assert len(entries) == len(set(entries)) > 120
    for entry in entries:
        pattern = re.compile(entry)
        assert pattern.groups == 0
        assert not pattern.search("")


@pytest.mark.parametrize(
    "text",
    [
        "你这个傻逼",
        "去死吧",
        "他妈的",
        "卧槽",
        "FUCK you",
        "滚",
        "你真贱",
        "我操！",
        "操你妈",
        "尼玛",
        "王八蛋",
        "约炮",
        "sb",
    ],
)
def test_rude(text):
    assert is_rude(text)


def test_rude_is_what_an_entry_matches_as_it_stands_in_the_file():
    lines = RUDE_WORDS_FILE.read_text(encoding="utf-8").splitlines()
    entries = [line for line in lines if line.strip() and not line.startswith("#")]
    plain = re.compile("|".join(entries), re.IGNORECASE)
    draw = random.Random(0)
    words = [re.sub(r"[][()?:|<=^$*]", "", entry) for entry in entries]
    letters = sorted({*"".join(words), *"".join(words).upper(), *"ſKıİ 的\n"})
    answers = []
    for _ in range(20_000):
        # Bits of two entries, so that words, their exceptions and both in part stand side by side.
        text = [character for word in draw.choices(words, k=2) for character in word[draw.randrange(len(word)) :][:4]]
        place = draw.randrange(len(text) + 1)
        text[place : place + draw.randrange(2)] = draw.choice(letters) * draw.randrange(2)
        answers.append(plain.search("".join(text)) is not None)
        assert is_rude("".join(text)) == answers[-1], text
    assert 1000 < sum(answers) < 19_000


@pytest.mark.parametrize(
    "text",
    [
        "操作系统",
        "我做体操，每天都做",
        "没有节操，",
        "我操作不好",
        "性交往的话题",
        "打击性交易",
        "这叫做爱心",
        "路口交警",
        "出口交税",
        "他妈的手艺很好",
        "他妈妈真漂亮",
        "他妈才四十岁",
        "祝你生日快乐，今日你妈妈来吗",
        "今天气温不高",
        "饼干你妈妈吃吗",
        "畜牧业",
        "我喜欢摇滚。",
        "摇滚蛋糕",
        "地球在滚动",
        "失去死党",
        "我去他妈家吃饭",
        "去你妹妹家",
        "我见过你妹",
        "炸鸡吧",
        "羽毛片",
        "DNA片段",
        "比赛牛不牛",
        "踩到狗屎",
        "工业废物",
        "糖尿病神经病变",
        "印尼妹子",
        "玛瑙和尼玛县",
        "妈妈逼孩子学习",
        "ask sb to do sth",
        "干净的草地",
        "笨蛋，我想你了",
    ],
)
def test_harmless_neighbours_of_rude_words(text):
    assert not is_rude(text)


def test_no_reply_of_the_demo_corpus_is_rude():
    """Its users are, now and then: the model learns to answer them kindly."""
    replies = [reply for turns in demo.generate(1000) for reply in turns[1::2]]
    assert not any(map(is_rude, replies))


def test_dialogues_are_cut_before_a_bad_exchange():
    good, end = ["你好", "好呀"], ["再见", "慢走"]
    assert only("rude", [[*good, "你傻逼", "哦", *end], [*good, "哦", "你傻逼"], ["傻逼", "哦", *end]]) == [good, good]
    assert only("wordless", [[*good, "嗯", "=。=", *end], [*good, "？？", "怎么了"], ["嗯", "。"]]) == [
        good,
        [*good, "？？", "怎么了"],
    ]
    assert only("wordless", [["嗯", "坏\ufffd字"]]) == []
    assert (
        only("incomplete", [[*good, "嗯"], [*good, "", "嗯", *end], ["嗯"], ["", "嗯"], ["嗯", " "], good])
        == [good] * 3
    )


def test_only_exact_duplicates_go():
    assert only("duplicates", [["一", "二"], ["一", "三"], ["一", "二"], ["一", "二", "三", "四"]]) == [
        ["一", "二"],
        ["一", "三"],
        ["一", "二", "三", "四"],
    ]


def test_a_reply_is_given_at_most_so_often():
    same = [[f"问{i}", "你猜"] for i in range(50)]
    other = [[f"说{i}", f"答{i}"] for i in range(50)]
    kept = only("frequent", same + other)
    assert kept == same[:20] + other
    assert only("frequent", [*same, *other, ["你好", "好呀", "是吗", "你猜"]])[-1] == ["你好", "好呀"]


def test_neighbours_are_joined_only_when_asked_for():
    pairs = [[f"问{i}", f"答{i}"] for i in range(10)]
    assert "sessions" not in [row.name for row in clean(pairs).table]
    joined = only("sessions", pairs)
    assert [len(turns) for turns in joined] == [8, 8, 4]
    assert [turn for turns in joined for turn in turns] == [turn for turns in pairs for turn in turns]
    assert only("sessions", [["一"], ["二", "三"]]) == [["一"], ["二", "三"]]


@pytest.mark.parametrize("name", NAMES)
def test_each_rule_can_be_switched_off(name):
    table = clean([["你好", "好呀"]], off=[name]).table
    assert name not in [row.name for row in table]
    assert [row.name for row in table] == [rule.name for rule in RULES if rule.default and rule.name != name]


def test_with_every_rule_off_nothing_changes():
    dialogues = [["你傻逼", "。。。。。。"], ["", "嗯"], ["　"]]
    assert clean(dialogues, off=NAMES).dialogues == dialogues


def test_an_unknown_rule_is_said():
    with pytest.raises(UserError, match="rude"):
        clean([], off=["ruude"])


def test_the_table_counts_what_each_rule_did():
    dialogues = [["你好　　", "好呀"], ["你好 ", "好呀"], ["滚！", "你才傻逼"], ["问", "。"], ["问"]]
    result = clean(dialogues)
    assert result.dialogues == [["你好", "好呀"]]
    assert [(row.name, row.changed, row.dialogues_before, row.dialogues_after) for row in result.table] == [
        ("normalise", 2, 5, 5),
        ("incomplete", 1, 5, 4),
        ("rude", 1, 4, 3),
        ("wordless", 1, 3, 2),
        ("duplicates", 1, 2, 1),
        ("frequent", 0, 1, 1),
    ]
    assert result.table[0].characters_before == 20
    assert result.table[-1].turns_after == 2
    assert "傻逼" not in str(result) and "rude" in str(result)


def test_the_given_dialogues_are_left_alone():
    dialogues = [["你好　", "好呀"], ["一", "二"]]
    clean(dialogues, on=["sessions"])
    assert dialogues == [["你好　", "好呀"], ["一", "二"]]


def test_roles_never_shift():
    draw = random.Random(0)
    texts = ["你好", "", "你妹", "=。=", "好！！！！！", "你猜", "　", "坏\ufffd", "对"]
    # u and a name the speaker, and survive every rule.
    dialogues = [
        [("a" if i % 2 else "u") + draw.choice(texts) + ("的" if draw.random() < 0.7 else "") for i in range(length)]
        for length in (draw.randrange(9) for _ in range(2000))
    ]
    for off in [[], *([name] for name in NAMES)]:
        for turns in clean(dialogues, off=off, on={"sessions"} - set(off)).dialogues:
            assert [turn[0] for turn in turns] == ["a" if i % 2 else "u" for i in range(len(turns))]
    for turns in clean(dialogues).dialogues:
        assert len(turns) % 2 == 0


def test_a_list_of_questions_and_answers_keeps_its_answers():
    """Ninety answers to eighteen thousand questions, as in a customer service's list: none of them is too frequent."""
    dialogues = [[f"问题{i}", f"回答{i % 9}"] for i in range(1800)]
    assert clean(dialogues).dialogues == dialogues
    flooded = [*dialogues, *([f"别的{i}", "呵呵"] for i in range(5000))]
    replies = [turns[1] for turns in clean(flooded).dialogues]
    assert replies.count("呵呵") == 1000
    assert replies.count("回答0") == 200
