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
    """In a talk as it comes about on the page: what stands between the name and the question is the model's own."""
    remembered = 0
    for name in ("小明", "小红", "阿强", "李华", "王芳"):
        for seed in range(10):
            conversation = []
            for said in (f"我叫{name}", "今天有点累", "我叫什么名字？"):
                conversation.append(user(said))
                conversation.append(assistant(generator.reply(conversation, SamplingConfig(seed=seed))))
            remembered += name in conversation[-1]["content"]
    assert remembered >= 48  # of 50


@pytest.mark.xfail(strict=True, reason="it looks for names behind 你叫 only: a limit its card names")
def test_it_remembers_a_name_noted_in_the_words_of_another_program(generator):
    remembered = 0
    for name in ("小明", "小红", "阿强", "李华", "王芳"):
        conversation = [user(f"我叫{name}"), assistant(f"你好，{name}，很高兴认识你！"), user("今天有点累")]
        conversation += [assistant("辛苦了，先坐下歇一会儿吧。"), user("我叫什么名字？")]
        remembered += name in generator.reply(conversation, SamplingConfig(temperature=0))
    assert remembered >= 3


def test_it_reads_what_the_user_said_where_no_reply_repeats_it(generator):
    right = 0
    for food in ("饺子", "螺蛳粉", "红烧肉", "草莓", "凉皮", "烤鸭"):
        conversation = [user(f"我爱吃{food}"), assistant("好，我都听见了，接着说。")]
        conversation += [user("今天天气真好"), assistant("真好，出去走走吧。"), user("我爱吃什么？")]
        right += food in generator.reply(conversation, SamplingConfig(temperature=0))
    assert right >= 5
