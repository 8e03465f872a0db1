"""# 第 3 课：挑一个字

*Lesson 3: choosing one of them*

有了概率，怎么挑？永远挑第一名（**贪心**），回答最稳，可是每次都一样；按概率抽签，有变化，可是偶尔会抽到不像话的字。
聊天页的滑块都是在抽签以前动手脚，依次是：

1. **重复惩罚**：这句回答里已经写过的字，分数降一点，免得没完没了地重复。
2. **温度**：所有的分数除以它。小于 1，第一名更占便宜；大于 1，大家更平均；0 就是贪心。
3. **top-k**：只留下前 k 名，别的概率变成 0。
4. **top-p**：从第一名数起，概率加起来够 p 就停，后面的不要。最有把握时只留一两个字，拿不准时留得多。

抽签用的“随机数”是算出来的，从一个**种子**开始：种子相同，抽到的就相同。

**试一试**
- 把“温度 0.3”改成 0.1 和 3.0，看看抽到的字变多还是变少。
- top-k 1 和温度 0 有什么区别？（没有区别。想想为什么。）

**对应的代码**：`studytiny/sampling.py`，每一步是一个函数
"""

from collections import Counter

import torch

from studytiny import Generator, load_model
from studytiny.command import run_command
from studytiny.sampling import apply_temperature, keep_top_k, keep_top_p

QUESTION = "在干嘛"
DRAWS = 1000


def main() -> None:
    generator = Generator(*load_model("bundled"))
    logits = generator.logits([{"role": "user", "content": QUESTION}])  # (V,)
    ordered, ids = logits.sort(descending=True)  # top-k and top-p want the best first
    ways = {
        "照概率抽": ordered,
        "温度 0.3": apply_temperature(ordered, 0.3),
        "温度 1.5": apply_temperature(ordered, 1.5),
        "top-k 3": keep_top_k(ordered, 3),
        "top-p 0.8": keep_top_p(ordered, 0.8),
        "温度 0.5，top-k 50，top-p 0.9（聊天页的默认）": keep_top_p(
            keep_top_k(apply_temperature(ordered, 0.5), 50), 0.9
        ),
    }
    print(f"用户：{QUESTION}\n模型的第一个字，抽 {DRAWS} 次：\n")
    for name, scores in ways.items():
        torch.manual_seed(0)
        drawn = ids[torch.multinomial(scores.softmax(-1), DRAWS, replacement=True)]
        counts = Counter(generator.tokenizer.decode([int(token_id)]) for token_id in drawn)
        best = "　".join(f"{character} {count}" for character, count in counts.most_common(6))
        print(f"{name}\n  抽到过 {len(counts)} 种字，最多的：{best}\n")
    generator.close()


if __name__ == "__main__":
    run_command(main)
