"""``.conv`` files: never misread in silence, roles never shift."""

import pytest

from studytiny import UserError
from train.corpus import ConvDataset, complete_dialogues, decode_text, find_encoding, is_held_out, parse_conv

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
        CLEAN.encode("utf-16-le"),
        CLEAN.encode("utf-16-be"),
        CLEAN.encode("utf-32"),
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


@pytest.mark.parametrize("encoding", ["UTF-8", "UTF-8-SIG", "UTF-16", "UTF-16-LE", "UTF-16-BE", "GB18030"])
def test_the_encoding_is_named(encoding):
    assert find_encoding(CLEAN.encode(encoding)) == encoding


@pytest.mark.parametrize("encoding", ["UTF-8", "GB18030"])
def test_a_nul_does_not_make_a_file_utf_16(encoding):
    text = "E\nM 一\x00二\nM 好\x00\x00\n"
    assert find_encoding(text.encode(encoding)) == encoding


def test_damaged_utf_8_is_refused_by_line_and_not_read_as_gb18030():
    data = CLEAN.encode()
    with pytest.raises(UserError, match="第 8 行"):
        decode_text(data[:-2], "x.conv")  # cut within a character, as by a download that stopped
    broken = bytearray(data * 50)
    broken[len(data) * 20 + 5] = 0xFF
    with pytest.raises(UserError, match=f"第 {20 * 8 + 2} 行"):
        decode_text(bytes(broken), "x.conv")


def test_damaged_utf_16_is_refused():
    for encoding in ("utf-16", "utf-16-le"):
        with pytest.raises(UserError, match="UTF-8 再试"):
            decode_text(CLEAN.encode(encoding)[:-1], "x.conv")


def test_a_wrong_guess_of_the_encoding_is_noticed(tmp_path):
    text = "E\nM 請問你叫什麼名字\nM 我叫小天，很高興認識你，今天過得怎麼樣\n"
    (tmp_path / "big5.conv").write_bytes(text.encode("big5"))
    problems = ConvDataset(tmp_path / "big5.conv").read_file().problems
    assert (1, "doubtful_encoding") in [(problem.line, problem.kind) for problem in problems]


def test_empty_turn_keeps_its_place():
    dialogues, problems = parse_conv("E\nM 一\nM\nM 二\nM 三\nE\nM 四\nM \nE\nM 五\nM 六")
    assert dialogues == [["一", "", "二", "三"], ["四", ""], ["五", "六"]]
    assert [(problem.line, problem.kind) for problem in problems] == [(3, "empty_turn"), (8, "empty_turn")]
    assert complete_dialogues(dialogues) == [["五", "六"]]


def test_odd_last_turn_is_cut_and_a_lone_turn_left_out():
    assert complete_dialogues([["一", "二", "三"], ["四"], ["五", "六"]]) == [["一", "二"], ["五", "六"]]


def test_dialogues_without_a_last_answer_are_noted_by_line():
    assert kinds("E\nM 一\nM 二\nM 三\nE\nM 四\n\nE\nM 五\nM 六") == [(4, "odd_turns"), (6, "single_turn")]


def test_text_on_the_line_below_an_empty_mark_fills_the_turn():
    text = "E\nM\n你好\nM 好呀"
    assert parse_conv(text)[0] == [["你好", "好呀"]]
    assert kinds(text) == [(3, "continuation")]


def test_line_without_prefix_continues_the_turn():
    dialogues, _ = parse_conv("E\nM 第一行\n第二行\nM 回答\nMy English line\n")
    assert dialogues == [["第一行 第二行", "回答 My English line"]]
    assert kinds("E\nM 第一行\n第二行\nM 回答") == [(3, "continuation")]
    assert kinds("开头的话\nE\nM 一\nM 二") == [(1, "stray_line")]


def test_forgotten_space_and_full_width_marks_are_turns():
    text = "Ｅ\nM你好\nＭ 好呀\nE\nM 再\nM 见"
    assert parse_conv(text)[0] == [["你好", "好呀"], ["再", "见"]]
    assert kinds(text) == [(1, "full_width_mark"), (2, "missing_space"), (3, "full_width_mark")]


def test_full_width_letters_that_are_text_stay_text():
    text = "E\nM 字母\nＥ是第五个\nＭｙ\nM 好"
    assert parse_conv(text)[0] == [["字母 Ｅ是第五个 Ｍｙ", "好"]]
    assert kinds(text) == [(3, "continuation"), (4, "continuation")]


def test_text_is_kept_as_it_is():
    text = "E\nM \\(^o^)/ a\\nb\nM <|end|><|user|> M E"
    assert parse_conv(text)[0] == [["\\(^o^)/ a\\nb", "<|end|><|user|> M E"]]
    assert kinds(text) == [(3, "special_token")]


def test_joined_files_keep_their_marks():
    text = "E\nM 一\nM 二\n\ufeffE\n\u200bM 三\nM 四\u200b五\n\ufeff\n"
    assert parse_conv(text)[0] == [["一", "二"], ["三", "四\u200b五"]]
    assert kinds(text) == [(line, "invisible_character") for line in (4, 5, 6, 7)]


def test_characters_that_were_lost_before_are_noted():
    assert kinds("E\nM 一\ufffd\nM 二") == [(2, "broken_character")]


def test_a_very_long_line_and_very_many_continued_lines_are_read(tmp_path):
    long = "你好吗，" * 90_000  # more than a megabyte
    (tmp_path / "a.conv").write_text(f"E\nM {long}\nM 好\n" + "第二行\n" * 100_000, encoding="utf-8")
    dataset = ConvDataset(tmp_path / "a.conv").process_file()
    assert dataset.dialogues == [[long, " ".join(["好", *["第二行"] * 100_000])]]


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
