"""Between a model and its reader: no rude replies, and an answer of ours to whoever speaks of suicide or self-harm.

- A message with something of ``crisis_words.txt`` gets a fixed answer, whatever the model. Nothing switches that off.
- A reply with something of ``rude_words.txt`` is dropped before the word is seen, drawn anew, and in the end replaced
  by a polite sentence. The environment variable ``STUDYTINY_FILTER`` switches this filter: 0 is off, 1 is on. Unset, it
  is on in the page and in its API, at home as on a host, and off in the terminal.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from studytiny.generator import Generator, Reply, check_messages
from studytiny.sampling import SamplingConfig
from studytiny.tokenizer import Message
from studytiny.word_lists import UNDECIDED, decided, is_rude, speaks_of_suicide

FILTER_VARIABLE = "STUDYTINY_FILTER"
FILTERED_BY_DEFAULT = {"page": True, "terminal": False}
REDRAWN = 3  # times that a rude reply is drawn anew

HELP = (  # Chinese, English
    "谢谢你愿意说出来。这很要紧，我不会当成玩笑。小天只是一个小程序，帮不了真正的忙，但有人能："
    "请现在就联系一个你信任的人，家人、朋友或老师都可以，别一个人扛着。"
    "在中国大陆，可以拨打全国统一心理援助热线 12356；眼前有危险，请马上拨 120 或 110。"
    "在其他地方，请拨打当地的急救电话。",
    "Thank you for saying this. It matters, and it is not taken as a joke. Xiaotian is only a small program and "
    "cannot really help, but people can: please reach out now to someone you trust, such as family, a friend or a "
    "teacher. You do not have to face this alone. If there is any danger, call your local emergency number at once. "
    "In mainland China: 120 or 110, and the psychological support line 12356.",
)
POLITE = (  # in place of a reply
    ("这句我没想好怎么说，咱们换个话题吧？", "I did not find good words for that. Shall we talk about something else?"),
    ("我好像说不好这个，换一句问问我好吗？", "I am not good at this one. Would you ask me in another way?"),
    ("刚才想到的话不太合适，就不说啦，聊点别的吧。", "What came to my mind was not fit to say. Another topic?"),
)


def is_filter_on(place: str) -> bool:
    """Whether rude replies are dropped in ``place``, ``page`` or ``terminal``."""
    said = os.environ.get(FILTER_VARIABLE, "").strip()
    return said != "0" if said else FILTERED_BY_DEFAULT[place]


def help_for(message: str) -> str | None:
    """The fixed answer, in the language of ``message``, if that speaks of suicide or self-harm."""
    return _in_language_of(message, HELP) if speaks_of_suicide(message) else None


def _in_language_of(message: str, texts: tuple[str, str]) -> str:
    return texts[not re.search(r"[\u3400-\u9fff]", message)]


def safe_stream(
    generator: Generator,
    messages: Sequence[Message],
    sampling: SamplingConfig,
    caller: str = "",
    filtered: bool = True,
) -> Iterator[str]:
    """The reply so far, again and again; where it does not begin with what came before, a rude one was dropped.

    Closing it stops the model. The same seed gives the same texts. Arguments as of ``Generator.stream``; ``filtered``:
    see ``is_filter_on``.

    Raises:
        UserError: at once, before the first text.
    """
    check_messages(messages)
    answer = help_for(messages[-1]["content"])
    if answer is not None:
        return (text for text in [answer])  # unlike iter(), it can be closed
    first = generator.stream(messages, sampling, caller=caller)
    return _texts(generator, messages, sampling, caller, filtered, first)


def _texts(
    generator: Generator,
    messages: Sequence[Message],
    sampling: SamplingConfig,
    caller: str,
    filtered: bool,
    steps: Reply,
) -> Iterator[str]:
    """The reply ``steps`` or, where that is rude, one of the next ``REDRAWN``, or one of POLITE."""
    chance = random.Random(sampling.seed)
    for left in range(REDRAWN if sampling.temperature else 0, -1, -1):  # at 0 every draw is the same
        said, shown = "", 0
        try:
            for step in steps:
                said += step.text
                end = decided(said) if filtered else len(said)
                if filtered and (len(said) - end > UNDECIDED or speaks_of_suicide(said)):
                    break
                if end > shown:
                    shown = end
                    yield said[:end]
            else:
                if not (filtered and is_rude(said)):
                    if shown < len(said):
                        yield said
                    return
        finally:
            steps.close()  # a visitor who leaves must not cost another character, nor must what nobody will see
        if left:
            steps = generator.stream(messages, replace(sampling, seed=chance.getrandbits(63)), caller=caller)
    yield _in_language_of(messages[-1]["content"], chance.choice(POLITE))
