"""# 第 6 课：怎样学会的

*Lesson 6: how it learns*

刚造好的模型，几百万个参数都是随机数，每个字的概率都差不多。训练就是反复做三件事：

1. 给它读一段对话，每到一处，看它给**真正的下一个字**多大的概率；
2. 概率越小，**损失**（−ln 概率）越大：概率 1 时损失是 0，概率千分之一时约是 6.9；
3. 算出每个参数往哪边挪一点点，损失会变小（求导，反向传播），就挪那么一点点。

下面从零开始教一个很小的模型。语料只有四段，所以它是背下来的：问它没学过的“草是什么颜色的”，它照样答天空的颜色。学得多、
说法多，才逼得它找规律。怎么知道它是背的还是会的？留几段对话不给它学，只用来考它（**留出**的对话）。

**试一试**
- 在 `DIALOGUES` 里加一段自己的话，看它要几步才学会。
- 把学习率 `3e-3` 改成 `3e-1`，看看步子太大会怎样。

**对应的代码**：`train/trainer.py`；真正的训练：`python -m train`
"""

import math

import torch
import torch.nn.functional as F

from studytiny import DialogueModel, Generator, SamplingConfig, Tokenizer
from studytiny.command import run_command

DIALOGUES = [
    ("你好", "你好呀，今天过得怎么样？"),
    ("你叫什么名字？", "我叫小天，是一个很小的模型。"),
    ("天空是什么颜色的？", "晴天的时候是蓝色的。"),
    ("我有点累", "那就歇一会儿吧，喝口水。"),
]
ASKED = ("你叫什么名字？", "草是什么颜色的？")  # learnt, and never seen
SHOWN = (0, 3, 6, 10, 20, 40, 80)  # steps


def main() -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer(sorted(set("".join(map("".join, DIALOGUES)))))
    model = DialogueModel(tokenizer.vocab_size, d_model=64, n_head=4, n_layers=2, max_length=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = [
        tokenizer.encode_dialogue([{"role": "user", "content": said}, {"role": "assistant", "content": reply}]).ids
        for said, reply in DIALOGUES
    ]
    print(f"{sum(p.numel() for p in model.parameters())} 个参数，词表 {tokenizer.vocab_size} 项")
    print(f"全靠瞎猜，损失应是 ln {tokenizer.vocab_size} = {math.log(tokenizer.vocab_size):.2f}\n")
    for step in range(SHOWN[-1] + 1):
        losses = []
        for row in rows:
            ids = torch.tensor([row])  # (1, T)
            logits = model(ids)[0, :-1]  # (T - 1, V): the guess at each place
            losses.append(F.cross_entropy(logits, ids[0, 1:]))  # against what really follows
        loss = torch.stack(losses).mean()
        if step in SHOWN:
            said = "　".join(f"{question} → {say(model, tokenizer, question)}" for question in ASKED)
            print(f"第 {step:>2} 步　损失 {loss.item():.3f}　{said}")
        optimizer.zero_grad()
        loss.backward()  # which way each parameter should go
        optimizer.step()  # a small step that way


def say(model, tokenizer, question) -> str:
    generator = Generator(model, tokenizer, precision="float32")
    reply = generator.reply([{"role": "user", "content": question}], SamplingConfig(temperature=0, max_new_tokens=20))
    generator.close()
    return reply


if __name__ == "__main__":
    run_command(main)
