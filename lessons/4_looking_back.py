"""# 第 4 课：往前看

*Lesson 4: looking back*

要回答“我叫什么”，模型得回头找名字在哪里。这件事由**注意力**来做：每一层有几个**头**，每个头在每个字上问一个问题
（query），前面的每个字各举一块牌子（key）；问题和牌子合不合拍，决定从那个字收集多少信息（value）。份额加起来是 1，
后面的字还没写，一律不许看。没有人规定哪个头看什么，都是训练时自己学会的，只有一对例外：专管抄写的那一对，开头就写进了
权重里（`train/induction.py`），然后照样接着学。

StudyTinyModel 也有注意力，可是算错了方向：它看的是同一批里**别的对话**在同一个位置上的字，而不是这段对话里前面的字。
只有一段对话时，它什么也看不到，所以答话没有前因后果。下面的程序把用户说的名字换掉一个字，它的分数一点都不变。

**试一试**
- 把 `NAME` 换成你的名字，再看哪个头在找它。
- 在 `MESSAGES` 里多隔几句再问，它还找得到吗？

**对应的代码**：`studytiny/model.py` 的 `Attention`，`studytiny/published.py`，`studytiny/xray.py`
"""

import torch

from studytiny import load_model
from studytiny.command import run_command
from studytiny.published import PublishedModel
from studytiny.xray import look_inside, looked_at

NAME = "小雨"
MESSAGES = [
    {"role": "user", "content": f"我叫{NAME}"},
    {"role": "assistant", "content": "很高兴认识你！"},
    {"role": "user", "content": "我叫什么？"},
    {"role": "assistant", "content": f"你叫{NAME}。"},  # what we look at from inside
]


def main() -> None:
    model, tokenizer = load_model("bundled")
    inside = look_inside(model, tokenizer, MESSAGES)
    layers, heads = inside.attention.shape[:2]
    first = 1 + MESSAGES[0]["content"].index(NAME)  # where the user said the name, behind <|user|>
    place = MESSAGES[-1]["content"].index(NAME)  # where the reply says it
    print(f"写“{MESSAGES[-1]['content']}”里的“{NAME[0]}”以前，各个头有几成在看用户说的名字：")
    for layer in range(layers):
        shares = [sum(looked_at(inside, layer, head, place)[first : first + len(NAME)]) for head in range(heads)]
        print(f"  第 {layer + 1} 层　" + "　".join(f"{share:4.0%}" for share in shares))

    print("\n把名字换掉一个字，下一个字的分数变了多少（最大的一处）：")
    ids = inside.ids[: inside.begin + place]
    other = list(ids)
    other[first] = tokenizer.vocab["大" if NAME[0] != "大" else "小"]
    torch.manual_seed(0)
    blind = PublishedModel(tokenizer.vocab_size, d_model=64).eval()  # untrained: the bug is in its shape
    for name, one in (("自带模型", model), ("原模型的架构", blind)):
        with torch.inference_mode():
            scores = [one.independent_logits(torch.tensor([each]))[0, -1] for each in (ids, other)]
        print(f"  {name}：{float((scores[0] - scores[1]).abs().max()):.4f}")


if __name__ == "__main__":
    run_command(main)
