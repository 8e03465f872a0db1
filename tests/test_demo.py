"""What train.demo promises: the same corpus for the same seed, clean turns, and facts that are answered as told."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from studytiny.command import run_command
from studytiny.word_lists import is_rude
from train.corpus import Unlearnt
from train.demo import FOLDER, TopicError, compose_dialogues, generate, write_conv
from train.demo.__main__ import main
from train.demo.compose import MAX_COST, MAX_TURNS, SILENT
from train.demo.topics import load_book

ROOT = Path(__file__).resolve().parents[1]
RUDE = ("操你", "傻逼", "他妈", "妈的", "滚开", "滚蛋", "混蛋", "贱", "废物", "垃圾", "去死", "王八", "屁")


@pytest.fixture(scope="module")
def corpus():
    return compose_dialogues(10000, 0)


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


def test_what_a_file_is_written_from_has_no_reply_that_is_not_to_be_learnt():
    def unlearnt(misheard):
        return sum(isinstance(turn, Unlearnt) for turns in generate(300, 7, misheard) for turn in turns)

    assert unlearnt(False) == 0 < unlearnt(True)


def test_every_dialogue_has_the_promised_shape(corpus):
    assert len(corpus) == 10000
    for dialogue in corpus:
        assert 2 <= len(dialogue.turns) <= MAX_TURNS and len(dialogue.turns) % 2 == 0
        assert sum(len(turn) + 2 for turn in dialogue.turns) <= MAX_COST < 512
        for turn in dialogue.turns:
            assert turn and turn == turn.strip() and "\n" not in turn


def test_no_slot_and_no_choice_is_left_unfilled(corpus):
    for dialogue in corpus:
        assert not re.search(r"[{}|@<>()]", "".join(dialogue.turns)), dialogue.turns


def latest(dialogue, fact, before):
    """The value of `fact` told last before the turn `before`, and the turn it was told at."""
    found = [(turn, value) for turn, name, value in dialogue.told if name == fact and turn <= before]
    return found[-1] if found else None


def test_a_told_fact_is_answered_with_its_latest_value(corpus):
    from_afar = 0
    for dialogue in corpus:
        for at, fact in dialogue.recalled:
            turn, value = latest(dialogue, fact, at)
            assert value in dialogue.turns[turn] and value in dialogue.turns[at], (fact, dialogue.turns)
            from_afar += at - turn > 1
    assert from_afar > 6000


CANONICAL = {"name": "你叫", "hobby": "爱好是", "food": "爱吃", "home": "老家是", "color": "喜欢的颜色是"}


def events(corpus, *kinds):
    found = [(dialogue, event) for dialogue in corpus for event in dialogue.events if event.kind in kinds]
    assert found
    return found


def test_a_question_about_a_told_fact_is_answered_with_the_fact(corpus):
    for dialogue, event in events(corpus, "询问"):
        _, value = latest(dialogue, event.facts[0], event.turn)
        said = dialogue.turns[event.turn] + dialogue.turns[event.turn + 1]
        assert value in said, (event, dialogue.turns)


def test_a_wrong_claim_is_corrected_with_the_right_value(corpus):
    for dialogue, event in events(corpus, "记混"):
        _, value = latest(dialogue, event.facts[0], event.turn)
        assert value not in dialogue.turns[event.turn], (event, dialogue.turns)
        assert value in dialogue.turns[event.turn + 1], (event, dialogue.turns)
        assert not re.search("，(没错|说得对|对，)", dialogue.turns[event.turn + 1]), (event, dialogue.turns)


def test_a_right_claim_is_agreed_with_after_its_value_was_repeated(corpus):
    for dialogue, event in events(corpus, "确认"):
        _, value = latest(dialogue, event.facts[0], event.turn)
        assert value in dialogue.turns[event.turn], (event, dialogue.turns)
        reply = dialogue.turns[event.turn + 1]
        assert re.search(re.escape(value) + ".*，(没错|说得对|对，)", reply), (event, dialogue.turns)
        assert not re.search("不[是叫在对]", reply.replace(value, "")), (event, dialogue.turns)


def test_a_reply_names_the_fact_before_its_value(corpus):
    """Told and asked in the same words, the value right after them: so the second time it only has to be copied."""
    told = asked = 0
    for dialogue in corpus:
        known = set()
        for turn, name, value in dialogue.told:
            first = name not in known
            known.add(name)
            if not first or name not in CANONICAL or "记住了" not in dialogue.turns[turn + 1]:
                continue
            told += 1
            assert CANONICAL[name] + value in dialogue.turns[turn + 1], dialogue.turns[turn : turn + 2]
        for turn, kind, facts in dialogue.events:
            if kind == "询问" and len(facts) == 1 and facts[0] in CANONICAL:
                asked += 1
                assert CANONICAL[facts[0]] in dialogue.turns[turn + 1], dialogue.turns[turn : turn + 2]
    assert told > 300 and asked > 100


def test_a_fact_is_kept_whatever_stands_beside_it(corpus):
    """A remark of another topic before or after the fact changes nothing: the reply is about the fact."""
    remarks = {
        line.text for line in load_book(FOLDER).remarks if not set("()|") & set(line.text) and len(line.text) > 3
    }
    beside = 0
    for dialogue in corpus:
        facts_of = Counter(turn for turn, _, _ in dialogue.told)
        for turn, _, value in (told for told in dialogue.told if facts_of[told[0]] == 1):
            parts = dialogue.turns[turn].replace("。", "，").replace("！", "，").split("，")
            if len(parts) > 1 and {parts[0], parts[-1]} & remarks and "记" in (reply := dialogue.turns[turn + 1]):
                beside += 1
                assert value in reply or isinstance(reply, Unlearnt), dialogue.turns[turn : turn + 2]
    assert beside > 100


def test_a_remark_that_is_too_long_is_left_out(tmp_path):
    text = "@话题 随口\n> 我今天从早到晚一直在外面跑来跑去忙个不停\n< 歇一歇。\n@话题\n> 我叫{name}\n< 你叫{name}。\n"
    folder = broken_folder(tmp_path, text + "@询问 name\n> 我是谁？\n< 你叫{name}。\n")
    turns = [turn for dialogue in compose_dialogues(60, 0, folder) for turn in dialogue.turns]
    told = [turn for turn in turns if "我叫" in turn]
    assert told and any("跑来跑去" in turn for turn in turns) and not any("跑来跑去" in turn for turn in told)


def test_a_correction_replaces_the_old_value(corpus):
    for dialogue, event in events(corpus, "更正"):
        fact = event.facts[0]
        turn, value = latest(dialogue, fact, event.turn)
        assert turn == event.turn and value != latest(dialogue, fact, event.turn - 1)[1], (event, dialogue.turns)
        assert latest(dialogue, fact, event.turn - 1)[1] not in value


def test_a_fact_never_told_is_not_made_up(corpus):
    about_name = 0
    for dialogue, event in events(corpus, "未知"):
        assert not [name for turn, name, _ in dialogue.told if name in event.facts and turn <= event.turn]
        answered = {name for at, name in dialogue.recalled if at == event.turn + 1}
        assert not answered & set(event.facts), (event, dialogue.turns)
        about_name += event.facts == ("name",)
    assert about_name > 200


def test_the_first_reply_of_the_file_comes_most_often(tmp_path):
    folder = broken_folder(tmp_path, "@话题\n> 下雨了|天晴了|起风了\n< 第一句。\n< 第二句。\n< 第三句？\n< 第四句。\n")
    dialogues = compose_dialogues(600, 0, folder)
    counts = Counter(dialogue.turns[1] for dialogue in dialogues if dialogue.turns)
    assert [reply for reply, _ in counts.most_common()] == ["第一句。", "第二句。", "第三句？", "第四句。"]
    assert counts["第一句。"] > 200


def test_a_name_of_somebody_else_is_not_the_users_name(corpus):
    seen = 0
    for dialogue, event in events(corpus, "未知"):
        others = [value for turn, name, value in dialogue.told if name in ("other", "friend") and turn < event.turn]
        reply = dialogue.turns[event.turn + 1]
        seen += bool(others) and event.facts == ("name",)
        assert event.facts != ("name",) or not any(f"你叫{value}" in reply for value in others)
    assert seen > 40


def test_what_a_pronoun_stands_for_was_spoken_of_before():
    book = load_book(FOLDER)
    meant = {
        id(e): s.refers[0] for sections in book.sections.values() for s in sections if s.refers for e in s.exchanges
    }
    assert len(meant) > 30 and {"petname", "friend", "other", "home"} <= set(meant.values())


def test_a_reply_to_a_pronoun_names_the_latest_pet(corpus):
    answers = 0
    for dialogue in corpus:
        for turn, topic in dialogue.topics:
            if topic != "pronouns" or not re.match("它(多大|几岁|爱吃|喜欢吃)", dialogue.turns[turn]):
                continue
            _, value = latest(dialogue, "petname", turn)
            assert value in dialogue.turns[turn + 1], dialogue.turns
            answers += 1
    assert answers > 20


def test_the_same_friend_is_not_he_and_she(corpus):
    for dialogue in corpus:
        topics = [(turn, topic) for turn, topic in dialogue.topics if topic in ("fact_friend", "pronouns")]
        if {name for _, name, _ in dialogue.told} & {"other"}:
            continue  # two people may well be he and she
        said = "".join(dialogue.turns[turn] + dialogue.turns[turn + 1] for turn, _ in topics)
        said = re.sub("吉他|其他|他们|她们|他人", "", said)
        assert not ("他" in said and "她" in said), dialogue.turns


def test_the_reply_to_a_name_uses_it_but_for_those_not_learnt(corpus):
    told = [(d, turn, value) for d in corpus for turn, fact, value in d.told if fact == "name"]
    spoken = [(d, turn, value) for d, turn, value in told if not isinstance(d.turns[turn + 1], Unlearnt)]
    assert sum(value in dialogue.turns[turn + 1] for dialogue, turn, value in spoken) > 0.9 * len(spoken)
    assert 0.05 < 1 - len(spoken) / len(told) < SILENT + 0.05


def test_a_fact_that_no_reply_repeated_is_known_when_asked_for(corpus):
    """Then it stands in the user's words only: a model that reads nothing but its own replies cannot answer."""
    asked, replies = 0, set()
    for dialogue, event in events(corpus, "询问"):
        turn, value = latest(dialogue, event.facts[0], event.turn)
        reply, since = dialogue.turns[turn + 1], "".join(dialogue.turns[turn + 1 : event.turn : 2])
        if isinstance(reply, Unlearnt) and value not in since:
            asked += 1
            replies.add(reply)
            assert value in dialogue.turns[event.turn + 1], dialogue.turns
    assert asked > 200
    assert len(replies) > 0.5 * asked  # too many to be learnt by heart


def test_kinds_come_in_sensible_shares(corpus):
    def share(condition):
        return sum(map(bool, map(condition, corpus))) / len(corpus)

    def about(kind):
        return share(lambda dialogue: any(event.kind == kind for event in dialogue.events))

    assert 0.25 < share(lambda d: any(at - latest(d, fact, at)[0] > 1 for at, fact in d.recalled)) < 0.55
    assert 0.15 < share(lambda d: any(fact == "name" for _, fact, _ in d.told)) < 0.55
    assert 0.08 < share(lambda d: len({fact for _, fact, _ in d.told}) > 2) < 0.3
    assert 0.07 < share(lambda d: any(topic == "pronouns" for _, topic in d.topics)) < 0.3
    assert share(lambda d: 4 <= len(d.turns) <= 14) > 0.5 and share(lambda d: len(d.turns) < 4) < 0.15
    assert 0.08 < about("记混") < 0.3 and 0.05 < about("确认") < 0.2 and 0.08 < about("更正") < 0.3
    assert 0.1 < about("未知") < 0.4
    talk = [topic for dialogue in corpus for _, topic in dialogue.topics]
    assert 0.3 < sum(not topic.startswith(("fact_", "pronouns", "just_now")) for topic in talk) / len(talk) < 0.7


def test_names_are_open_and_evenly_spread(corpus):
    names = [value for dialogue in corpus for _, fact, value in dialogue.told if fact == "name"]
    assert len(set(names)) > 0.6 * len(names)
    characters = Counter(character for name in names for character in name)
    assert len(characters) > 500 and characters.most_common(1)[0][1] < 0.06 * sum(characters.values())


def any_characters(book):
    return "".join(re.sub("[()|]", "", line.text) for line in book.values["any_char"])


def test_characters_of_values_are_seen_often(corpus):
    seen = Counter(character for dialogue in corpus for turn in dialogue.turns for character in turn)
    book = load_book(FOLDER)
    used = {name for name in book.values if name in book.facts}
    while more := {n for u in used for line in book.values[u] for n in line.slots if n in book.values} - used:
        used |= more
    used.remove("any_char")  # thousands of characters, each as likely as the next: a small corpus has most of them
    assert sum(seen[character] > 0 for character in any_characters(book)) > 0.8 * len(any_characters(book))
    texts = "".join(re.sub("[{][a-z_]+[}]|[()|]", "", line.text) for name in used for line in book.values[name])
    rare = {character for character in texts if seen[character] < 3}
    assert len(rare) < 0.01 * len(set(texts)), "".join(sorted(rare))


def copied_folder(tmp_path: Path) -> Path:
    for part in ("topics", "values"):
        shutil.copytree(FOLDER / part, tmp_path / part)
    (tmp_path / "probes" / "values").mkdir(parents=True)
    return tmp_path


def test_held_out_values_are_never_composed(tmp_path):
    folder = copied_folder(tmp_path)
    free = compose_dialogues(600, 3, FOLDER)
    told = Counter(value for d in free for _, fact, value in d.told if fact in ("name", "home", "food", "petname"))
    held_out = [value for value, _ in told.most_common(60)]
    (folder / "probes" / "values" / "mine.txt").write_text(
        "# 留给测验\n\n" + "\n".join(held_out) + "\n", encoding="utf-8"
    )
    dialogues = compose_dialogues(600, 3, folder)
    values = [value for dialogue in dialogues for _, _, value in dialogue.told]
    assert len(values) > 500 and not set(values) & set(held_out)
    assert not [v for v in values for held in held_out if len(held) > 1 and not held.isdigit() and held in v]


def test_a_held_out_list_that_leaves_nothing_is_one_sentence(tmp_path):
    folder = copied_folder(tmp_path)
    (folder / "probes" / "values" / "all.txt").write_text("春天\n夏天\n秋天\n冬天\n", encoding="utf-8")
    with pytest.raises(TopicError) as caught:
        compose_dialogues(2000, 0, folder)
    assert "season.txt" in str(caught.value) and "\n" not in str(caught.value)


def test_a_slip_of_the_fingers_spares_the_values(corpus):
    for dialogue in corpus:
        for turn, _, value in dialogue.told:
            assert value in dialogue.turns[turn], dialogue.turns


def test_no_reply_has_a_rude_word(corpus):
    """Users may be rude; what the model learns to say is not."""
    for dialogue in corpus:
        for reply in dialogue.turns[1::2]:
            assert not is_rude(reply), reply
            # What it quotes are the user's own words; the composer quotes no word of rude_words.txt.
            harmless = (
                "“[^”]*”|(妈|我|爸|姨|姑|大|舅|干)妈的|马屁|屁股|垃圾(?:桶|短信|天天倒|倒了|带走|分类|袋)|(?:把|倒)垃圾"
            )
            text = re.sub(harmless, "", reply)
            assert not [word for word in RUDE if word in text], reply


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
        ("@话题 已知=moon\n> 你好\n< 你好呀。\n", 3, "moon"),
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
