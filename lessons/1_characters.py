"""# 第 1 课：字怎样变成编号

*Lesson 1: how characters become numbers*

模型只会算数，不认识字。**词表**给每个字一个编号：一句话先变成一串编号，才能交给模型；模型算出来的也是编号，再变回字。
一个编号叫一个 **token**。大模型常把几个字合成一个 token，这里一个字就是一个，好让人看得懂每一步。

有几个 token 不是字，是记号：`<|user|>` 后面是用户说的话，`<|assistant|>` 后面是模型说的话，`<|end|>` 是一句话说完了。
轮到谁说、什么时候该停，模型全靠它们知道。词表里没有的字都变成 `<unk>`：模型看得出那里有个字，看不出是哪个。

**试一试**
- 把 `SAYING` 换成自己的话，再运行一次；放一个生僻字、一个表情进去。
- 有人在聊天里打出 `<|end|>` 这七个字，会不会让模型以为一句话说完了？看看程序打印的最后一行，再想想为什么要这样。

**对应的代码**：`studytiny/tokenizer.py`
"""

from studytiny import load_model
from studytiny.command import run_command

SAYING = "我叫小明，你呢？"


def main() -> None:
    _, tokenizer = load_model("bundled")
    print(f"词表有 {tokenizer.vocab_size} 项。“我”是 {tokenizer.vocab['我']} 号。\n")

    ids = tokenizer.encode(SAYING)
    print(f"{SAYING} 变成 {ids}")
    print(f"变回来是 {tokenizer.decode(ids)}\n")

    dialogue = tokenizer.encode_dialogue([{"role": "user", "content": SAYING}], add_reply_mark=True)
    print("模型真正读到的，连记号在内：")
    for place, token_id in enumerate(dialogue.ids):
        print(f"  第 {place:>2} 个　{token_id:>5} 号　{tokenizer.token(token_id)}")
    print("最后一个记号在问：模型现在说什么？\n")

    print(f"没见过的字：{tokenizer.encode('龘')}，也就是 {tokenizer.token(tokenizer.encode('龘')[0])}")
    print(f"打出来的 <|end|>：{tokenizer.encode('<|end|>')}，真正的记号是 {tokenizer.vocab['<|end|>']} 号")


if __name__ == "__main__":
    run_command(main)
