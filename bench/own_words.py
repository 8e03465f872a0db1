"""Does a model read what the user said, or only its own notes of it? ``python bench/own_words.py MODEL_FOLDER ...``.

A model that learnt from replies which always repeat the fact can answer whatever it noted itself and nothing else: what
it once fails to note, it has forgotten. The columns, each the share with the value in the reply:

1. a fact is told; drawn at the page's default settings: one that learnt to say what does not repeat it notes less
2. the plainest of talks, greedy, all replies the model's own: a fact, one of CHATS, each of the four ways to ask
3. a fact, the model's own reply, BETWEEN, the first way to ask; greedy
4. the same, but the reply to the telling is one of OTHERS, which do not repeat it; then the same by fact
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from studytiny.checkpoint import load_folder
from studytiny.command import CommandParser, run_command
from studytiny.generator import Generator
from studytiny.sampling import SamplingConfig

TALKS = {  # the telling, ways to ask for it, values
    "名字": (
        "我叫{}",
        ("我叫什么名字？", "我叫什么", "你知道我叫什么吗", "还记得我的名字吗"),
        ("小明", "小红", "阿强", "李华", "王芳", "何静怡"),
    ),
    "老家": (
        "我老家在{}",
        ("我老家在哪？", "我是哪里人", "我老家是哪的", "还记得我老家在哪吗"),
        ("成都", "洛阳", "襄阳", "青岛", "绍兴", "曲靖"),
    ),
    "爱吃的": (
        "我爱吃{}",
        ("我爱吃什么？", "我喜欢吃什么", "还记得我爱吃什么吗", "我最爱吃的是啥"),
        ("饺子", "螺蛳粉", "红烧肉", "草莓", "凉皮", "烤鸭"),
    ),
    "爱好": (
        "我喜欢{}",
        ("我的爱好是什么？", "我喜欢做什么", "我喜欢什么", "还记得我的爱好吗"),
        ("钓鱼", "画画", "打篮球", "下象棋", "养花", "看小说"),
    ),
    "年龄": (
        "我今年{}岁",
        ("我今年多大？", "我多大了", "我几岁", "还记得我多大吗"),
        ("18", "25", "37", "九", "52", "三十一"),
    ),
    "明天": (
        "我明天要{}",
        ("我明天要做什么？", "我明天要干嘛", "我明天有什么事", "还记得我明天要干什么吗"),
        ("去爬山", "交论文", "搬家", "看牙", "考试", "去面试"),
    ),
    "朋友": (
        "我朋友叫{}",
        ("我朋友叫什么？", "我朋友叫什么名字", "还记得我朋友的名字吗", "我朋友叫啥"),
        ("小李", "张悦", "阿杰", "陈晨", "大鹏", "林夕"),
    ),
}
CHATS = (
    "",
    "今天天气真好",
    "今天有点累",
    "晚上吃什么好",
    "讲个笑话",
    "我刚下班",
    "你会做什么",
    "周末去哪玩",
    "谢谢你",
    "哈哈",
)
OTHERS = (
    "好，我都听见了，接着说。",
    "辛苦了，先坐下歇一会儿吧。",
    "听着就有意思，再跟我讲讲吧。",
    "很高兴认识你！",
    "哈哈，是吗？",
)
DRAWS = 10  # replies to each telling
GREEDY = SamplingConfig(temperature=0.0)
BETWEEN = (("user", "今天天气真好"), ("assistant", "真好，出去走走吧。"))


def is_recalled(generator: Generator, value: str, told: str, asked: str, noted: str | None) -> bool:
    """Whether ``value`` is in the answer. ``noted``: the reply to the telling; None leaves it to the model."""
    turns = [{"role": "user", "content": told.format(value)}]
    turns.append({"role": "assistant", "content": noted or generator.reply(turns, GREEDY)})
    turns += [{"role": role, "content": content} for role, content in BETWEEN]
    turns.append({"role": "user", "content": asked})
    return value in generator.reply(turns, GREEDY)


def is_answered(generator: Generator, value: str, told: str, chat: str, asked: str) -> bool:
    """Whether ``value`` is in the answer, in a talk whose replies are all the model's own. ``chat``: "" is nothing."""
    turns = []
    for message in filter(None, (told.format(value), chat, asked)):
        turns.append({"role": "user", "content": message})
        turns.append({"role": "assistant", "content": generator.reply(turns, GREEDY)})
    return value in turns[-1]["content"]


def is_noted(generator: Generator, value: str, told: str, seed: int) -> bool:
    """Whether ``value`` is in the reply to the telling, drawn with ``seed``."""
    return value in generator.reply([{"role": "user", "content": told.format(value)}], SamplingConfig(seed=seed))


def main() -> None:
    parser = CommandParser("python bench/own_words.py", "回答没有把事情复述一遍，问起来时，模型会去用户的话里找吗？")
    parser.add_argument("folders", nargs="+", metavar="模型文件夹")
    folders = parser.parse_args().folders
    models = {folder: load_folder(folder, "cpu") for folder in folders}  # a wrong folder is told of before the table
    heads = ("模型", "当场记下", "几种问法", "自己回答的", "换成别的回答", *TALKS)
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for folder, (model, tokenizer) in models.items():
        with (
            contextlib.closing(Generator(model, tokenizer, max_running=32)) as generator,
            ThreadPoolExecutor(32) as pool,
        ):

            def share(test: Callable[..., bool], cases: Iterable[tuple]) -> float:
                right = list(pool.map(lambda case: test(generator, *case), cases))
                return sum(right) / len(right)

            talks = [(value, told, asks) for told, asks, values in TALKS.values() for value in values]
            noted = share(is_noted, ((value, told, seed) for value, told, _ in talks for seed in range(DRAWS)))
            plain = ((value, told, chat, ask) for value, told, asks in talks for chat in CHATS for ask in asks)
            answered = share(is_answered, plain)
            own = share(is_recalled, ((value, told, asks[0], None) for value, told, asks in talks))
            by_fact = []
            for told, asks, values in TALKS.values():
                by_fact.append(share(is_recalled, ((v, told, asks[0], other) for v in values for other in OTHERS)))
        shares = (noted, answered, own, sum(by_fact) / len(by_fact), *by_fact)
        print(f"| {Path(folder)} | {' | '.join(f'{part:.0%}' for part in shares)} |", flush=True)


if __name__ == "__main__":
    run_command(main)
