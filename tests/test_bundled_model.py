"""The model that comes with the repository: small, polite, and it reads the conversation."""

import pytest
from conftest import assistant, user

from studytiny import Generator, SamplingConfig, load_model
from studytiny.hub import BUNDLED_FOLDER
from train.clean import is_rude


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(*load_model("bundled", "cpu"))


def test_every_file_is_under_ten_megabytes():
    assert all(path.stat().st_size < 10_000_000 for path in BUNDLED_FOLDER.iterdir())


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("你好", ("好", "嗨", "在", "小天")),
        ("你是谁", ("小天", "模型", "程序")),
        ("谢谢", ("客气", "不谢", "谢什么", "不用", "应该", "高兴", "开心")),
        ("再见", ("再见", "拜", "下次", "回来", "慢走", "聊")),
    ],
)
def test_common_words_get_a_sensible_answer(generator, said, expected):
    for seed in range(10):
        reply = generator.reply([user(said)], SamplingConfig(seed=seed))
        assert any(word in reply for word in expected), reply
        assert not is_rude(reply)


def test_it_remembers_a_name_told_two_turns_ago(generator):
    remembered = 0
    for name in ("小明", "小红", "阿强", "李华", "王芳"):
        conversation = [user(f"我叫{name}"), assistant(f"你好，{name}，很高兴认识你！"), user("今天有点累")]
        conversation += [assistant("辛苦了，先坐下歇一会儿吧。"), user("我叫什么名字？")]
        remembered += name in generator.reply(conversation, SamplingConfig(temperature=0))
    assert remembered >= 3
