"""# 第 2 课：给所有的字打分

*Lesson 2: a score for every character*

模型只做一件事：读到这里，**下一个字是什么**？它给词表里的每个字打一个分（logit），分数可正可负。
把每个分数变成 e 的那么多次方，再除以总和，就成了概率（这一步叫 softmax）：都大于 0，加起来正好是 1。

有时它很有把握，第一名占九成多；有时好几个字都说得通，各占一两成。“透视”里颜色的深浅就是这个把握。
把握大不等于说得对：它只知道在学过的对话里，这里多半是哪个字。

**试一试**
- 换一句 `QUESTION`，猜猜第一个字会是什么，再看模型怎么猜。
- 把 `SO_FAR` 写长一点：后面的字往往比第一个字好猜得多，为什么？

**对应的代码**：`studytiny/model.py` 的 `DialogueModel.forward`，`studytiny/xray.py`
"""

import torch

from studytiny import load_model
from studytiny.command import run_command

QUESTION = "你叫什么名字？"
SO_FAR = "我叫"  # what the model has said already


def main() -> None:
    model, tokenizer = load_model("bundled")
    asked = tokenizer.encode_dialogue([{"role": "user", "content": QUESTION}], add_reply_mark=True).ids
    for so_far in ("", SO_FAR):
        ids = torch.tensor([asked + tokenizer.encode(so_far)])  # (1, T): one conversation, T tokens
        with torch.inference_mode():
            logits = model(ids)[0, -1]  # (V,): a score for each entry of the vocabulary
        probabilities = logits.exp() / logits.exp().sum()
        print(f"用户：{QUESTION}　模型：{so_far}▁")
        for probability, token_id in zip(*probabilities.topk(5), strict=True):
            name, score = tokenizer.token(int(token_id)), float(logits[token_id])
            print(
                f"  {name:<4} 分数 {score:6.2f}　概率 {float(probability):6.1%}　{'█' * round(float(probability) * 40)}"
            )
        print(f"  另外 {len(logits) - 5} 项加起来 {1 - float(probabilities.topk(5).values.sum()):.1%}\n")


if __name__ == "__main__":
    run_command(main)
