"""# 第 5 课：一个字一个字写完

*Lesson 5: a whole reply, one character at a time*

模型每次只给出一个字。写一句话就是反复做同一件事：打分，挑一个字，接在后面，再打分……直到它写出“说完了”的记号。
写下去的字不能收回。所以一个字不同，后面可能整句都不同：“透视”里换一个候选字再“接着写”，看到的就是这个。

聊天也没有别的秘密：模型自己什么都不记得，每次都把整段对话从头交给它读一遍。对话太长，超过它一次能读的字数，最早的话就丢掉了。
（`studytiny/generator.py` 会记住读过的部分算出来的数，不必真的重算，结果一样。）

**试一试**
- 把 `MESSAGES` 里的前两句删掉再运行：它还知道名字吗？
- 把 `answer` 里的 `argmax` 换成第 3 课的抽签。

**对应的代码**：`studytiny/generator.py`
"""

import torch

from studytiny import Generator, SamplingConfig, load_model
from studytiny.command import run_command
from studytiny.tokenizer import END_ID

MESSAGES = [
    {"role": "user", "content": "你好，我叫小雨"},
    {"role": "assistant", "content": "你叫小雨，我记住了。"},
    {"role": "user", "content": "我叫什么名字？"},
]
LONGEST = 60


@torch.inference_mode()
def answer(model, tokenizer, messages, begun="") -> str:
    """The most probable character again and again; the reply begins with ``begun``."""
    ids = tokenizer.encode_dialogue(messages, add_reply_mark=True).ids + tokenizer.encode(begun)
    reply = []
    while len(reply) < LONGEST:
        logits = model(torch.tensor([ids + reply]))[0, -1]  # all is read once more: slow, but nothing is hidden
        best = int(logits.argmax())
        if best == END_ID:
            break
        reply.append(best)
    return begun + tokenizer.decode(reply)


def main() -> None:
    model, tokenizer = load_model("bundled")
    for message in MESSAGES:
        print(f"{'用户' if message['role'] == 'user' else '模型'}：{message['content']}")
    reply = answer(model, tokenizer, MESSAGES)
    print(f"模型：{reply}\n")

    with torch.inference_mode():
        ids = tokenizer.encode_dialogue(MESSAGES, add_reply_mark=True).ids
        best = model(torch.tensor([ids]))[0, -1].topk(4).indices.tolist()
    print("换一个字开头，再让它自己写下去：")
    for token_id in best:
        print(f"  {answer(model, tokenizer, MESSAGES, tokenizer.decode([token_id]))}")

    generator = Generator(model, tokenizer, precision="float32")
    same = generator.reply(MESSAGES, SamplingConfig(temperature=0, repetition_penalty=1.0, max_new_tokens=LONGEST))
    generator.close()
    print(f"\nGenerator 写的：{same}（{'一样' if same == reply else '不一样'}）")


if __name__ == "__main__":
    run_command(main)
