"""``.conv`` files: never misread in silence, roles never shift."""

import pytest

from studytiny import UserError
from train.corpus import ConvDataset, complete_dialogues, decode_text, is_held_out, parse_conv

CLEAN = "E\nM 你好\nM 好呀\nE\nM 再见\nM 慢走\nM 谢谢\nM 不客气\n"
DIALOGUES = [["你好", "好呀"], ["再见", "慢走", "谢谢", "不客气"]]


def kinds(text):
    return [(problem.line, problem.kind) for problem in parse_conv(text)[1]]


@pytest.mark.parametrize(
    "data",
    [
        CLEAN.encode(),
        CLEAN.encode("utf-8-sig"),
        CLEAN.encode("gb18030"),
        CLEAN.encode("utf-16"),
        CLEAN.replace("\n", "\r\n").encode(),
        CLEAN.replace("\n", "\r").encode(),
        ("\ufeff" + CLEAN).replace("\n", "\r\n").encode("utf-8"),
        CLEAN.rstrip().encode(),
        (CLEAN + "E\n\n").encode(),
        CLEAN.removeprefix("E\n").encode(),
    ],
)
def test_encodings_and_line_ends_read_the_same(tmp_path, data):
    (tmp_path / "a.conv").write_bytes(data)
    dataset = ConvDataset(tmp_path / "a.conv").process_file()
    assert dataset.dialogues == DIALOGUES
    assert dataset.problems == []


def test_empty_turn_keeps_its_place():
    dialogues, problems = parse_conv("E\nM 一\nM\nM 二\nM 三\nE\nM 四\nM \nE\nM 五\nM 六")
    assert dialogues == [["一", "", "二", "三"], ["四", ""], ["五", "六"]]
    assert [problem.line for problem in problems] == [3, 8]
    assert complete_dialogues(dialogues) == [["五", "六"]]


def test_odd_last_turn_is_cut_and_a_lone_turn_left_out():
    assert complete_dialogues([["一", "二", "三"], ["四"], ["五", "六"]]) == [["一", "二"], ["五", "六"]]


def test_line_without_prefix_continues_the_turn():
    dialogues, _ = parse_conv("E\nM 第一行\n第二行\nM 回答\nMy English line\n")
    assert dialogues == [["第一行 第二行", "回答 My English line"]]
    assert kinds("E\nM 第一行\n第二行\nM 回答") == [(3, "continuation")]
    assert kinds("开头的话\nE\nM 一\nM 二") == [(1, "stray_line")]


def test_forgotten_space_and_full_width_marks_are_turns():
    text = "Ｅ\nM你好\nＭ 好呀\nE\nM 再\nM 见"
    assert parse_conv(text)[0] == [["你好", "好呀"], ["再", "见"]]
    assert kinds(text) == [(1, "full_width_mark"), (2, "missing_space"), (3, "full_width_mark")]


def test_text_is_kept_as_it_is():
    assert parse_conv("E\nM \\(^o^)/ a\\nb\nM <|end|><|user|> M E")[0] == [["\\(^o^)/ a\\nb", "<|end|><|user|> M E"]]


def test_control_characters_become_spaces():
    assert parse_conv("E\nM 一\x00二\x0b三\nM 四\t五")[0] == [["一 二 三", "四 五"]]
    assert kinds("E\nM 一\x00二\nM 四\t五") == [(2, "control_character")]


def test_file_without_separators_is_one_dialogue():
    assert parse_conv("M 一\nM 二")[0] == [["一", "二"]]
    assert kinds("M 一\nM 二") == [(1, "no_separator")]


def test_unreadable_bytes_are_refused_not_replaced():
    with pytest.raises(UserError, match="UTF-8"):
        decode_text(b"\xff\xff\xff\x00\x81", "x.conv")


@pytest.mark.parametrize(
    "content", ["", "\n\n", "E\nE\n", "E\nM 只有一句\n", "没有标记的小说。\n第二行。", "E\nM\nM\n"]
)
def test_nothing_to_learn_is_said(tmp_path, content):
    (tmp_path / "a.conv").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="没有可学的对话"):
        ConvDataset(tmp_path / "a.conv").process_file()


def test_missing_file_is_said(tmp_path):
    with pytest.raises(UserError, match="找不到语料文件"):
        ConvDataset(tmp_path / "none.conv").process_file()


def test_held_out_part_is_the_designs_rule():
    import hashlib

    turns = [[f"第{i}句", "好"] for i in range(2000)]
    expected = [int(hashlib.sha1(t[0].encode()).hexdigest(), 16) % 50 == 0 for t in turns]
    assert [is_held_out(t) for t in turns] == expected
    assert 20 < sum(expected) < 60
    assert is_held_out([" 第0句\t", "x"]) == is_held_out(["第0句", "x"])


def test_held_out_dialogues_are_not_in_the_vocabulary():
    turns = [[f"第{i}句", chr(0x4E00 + i)] for i in range(500)]
    dataset = ConvDataset.from_dialogues(turns)
    assert dataset.held_out_dialogues()
    assert len(dataset.held_out_dialogues()) + len(dataset.training_dialogues()) == 500
    vocabulary = dataset.build_vocab().vocab
    assert all(question_answer[1] not in vocabulary for question_answer in dataset.held_out_dialogues())


def test_an_old_vocabulary_file_is_replaced(tmp_path):
    (tmp_path / "vocab.txt").write_text("旧的", encoding="utf-8")
    tokenizer = ConvDataset.from_dialogues(DIALOGUES).build_vocab(vocab_file=tmp_path / "vocab.txt")
    assert (tmp_path / "vocab.txt").read_text(encoding="utf-8").count("\n") == tokenizer.vocab_size


def test_summary_counts_what_was_found_with_line_numbers(tmp_path):
    (tmp_path / "a.conv").write_text("E\nM 一\nM 二\nM 三\nE\nM 四\nM\nE\nM 五\n", encoding="utf-8")
    summary = ConvDataset(tmp_path / "a.conv").process_file().summary()
    assert "3 段对话，可用于学习 1 段" in summary
    assert "空的一句（整段对话不用于训练）：1 处，例如第 7 行" in summary
    assert "句数是奇数" in summary
    assert "只有一句" in summary
