"""The report of a run: README.md and curve.png in its folder, from what the run left there.

``python -m train.report FOLDER`` writes them again. Since a run's folder is a model folder, the report is also the
model card that a hub shows; its first lines (YAML) are for the hub, the rest is for a beginner.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from studytiny.command import CommandParser, run_command
from studytiny.errors import UserError
from studytiny.files import write_atomically
from train.curve import plot
from train.run_log import read_metrics, read_samples

RUN_FILE, REPORT_FILE = "run.json", "README.md"
UNKNOWN = "未测"
OPEN_LICENCES = {"Apache-2.0": "apache-2.0", "MIT": "mit"}  # as corpora name them -> as hubs do


@dataclass(frozen=True)
class RunFacts:
    """What the report says of a run besides its curve and samples.

    Attributes:
        corpora: for each {"name", "license", "dialogues", "training", "held_out"}.
        cleaning: rows of train.clean.RuleEffect as dictionaries, in the order applied.
        vocabulary: entries; ``unknown_rate``: share of the training characters that are not in it.
        tokens, labels: characters in the training rows, and those of them that are learnt.
        settings: TrainConfig as a dictionary.
        command: the command line, without personal paths.
        machine: {"device", "threads", "precision", "torch", "python"}.
        evaluation: what train.evaluate measured on the held-out split; {} while the run goes on.
        minutes: spent so far.
    """

    corpora: list[dict]
    cleaning: list[dict]
    vocabulary: int
    unknown_rate: float | None
    tokens: int
    labels: int
    parameters: int
    settings: dict
    command: str
    machine: dict
    preset: str
    evaluation: dict
    finished: bool
    minutes: float


_TYPES = {
    "list[dict]": list, "dict": dict, "str": str, "bool": bool, "int": int, "float": (int, float),
    "float | None": (int, float, type(None)),
}  # fmt: skip


def write_facts(folder: str | Path, facts: RunFacts) -> Path:
    """Saves ``facts`` as run.json; without the setting ``out``, since the folder may be given to others."""
    data = asdict(facts)
    data["settings"].pop("out", None)
    path = Path(folder) / RUN_FILE
    write_atomically(path, json.dumps(data, ensure_ascii=False, indent=2) + "\n")
    return path


def read_facts(folder: str | Path) -> RunFacts:
    """What write_facts saved.

    Raises:
        UserError: run.json is missing or damaged.
    """
    path = Path(folder) / RUN_FILE
    if not path.is_file():
        raise UserError(f"{folder} 里没有 {RUN_FILE}，写不出报告；请给出用 python -m train 训练得到的文件夹。")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name: data[field.name] for field in fields(RunFacts)}
        bad = [field.name for field in fields(RunFacts) if not isinstance(known[field.name], _TYPES[field.type])]
        bad += [name for name in ("corpora", "cleaning") if not all(isinstance(row, dict) for row in known[name])]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} 已损坏，读不出来；请重新复制这个文件夹，或接着训练一会儿让它重新写出。") from error
    if bad:
        raise UserError(f"{path} 里的 {'、'.join(bad)} 不对；请重新复制这个文件夹，或接着训练一会儿让它重新写出。")
    return RunFacts(**known)


# ---- the text ----

# measure -> its name, how to write it, what it means
MEASURES = {
    "bits_per_char": ("比特/字", "{:.3f}", "最要紧的一个数：读了前面的话，还差多少信息才能说准下一个字。**越低越好**。"
                      "低 0.1，每个字说准的可能性平均高约 7%；低 1，高一倍"),
    "perplexity": ("困惑度", "{:.2f}", "换个说法：每说一个字（结束符也算），相当于在几个同样可能的字之间犹豫。"
                   "越低越好，1 是毫不犹豫"),
    "dialogues": ("测了几段对话", "{:,}", "训练时从没见过的对话。太少（几十段）时，上面两个数只能看个大概"),
    "characters": ("测了几个字", "{:,}", "这些对话里回答的总字数"),
    "unknown_rate": ("词表外的字", "{:.2%}", "这些回答里模型不认识、也永远说不出的字。越低越好；高了就加大词表或语料"),
    "distinct_1": ("distinct-1", "{:.3f}", "抽样的回答里，不同的字 ÷ 总字数。太低是翻来覆去那几个字，太高也可能是乱说。"
                   "回答越多越长它自然越小，只在同样多的回答之间比"),
    "distinct_2": ("distinct-2", "{:.3f}", "同上，数的是相邻两个字的组合，更能看出是不是总说同一套话"),
    "mean_reply_chars": ("平均回答字数", "{:.1f}", "没有好坏；语料里的回答多长，它就学得多长"),
    "repetition_rate": ("车轱辘话", "{:.1%}", "把同一个短语（三个字以上）说了三遍的回答所占比例。最好是 0"),
    "profanity_rate": ("含脏话的回答", "{:.1%}", "最好是 0。语料里有脏话，模型就会学；可以先清洗语料再训练"),
}  # fmt: skip
SETTINGS = {
    "lr": "学习率的最大值：每一步改多大。太大会学乱（损失突然升高），太小学得慢",
    "weight_decay": "权重衰减：把权重轻轻往 0 拉，0 是不拉，能防止死记硬背",
    "epochs": "把语料学几遍（给了 minutes 就以时间为准）",
    "grad_accum_steps": "攒几批才改一次权重；内存小又想要大批时用",
    "use_amp": "机器算 bfloat16 更快时就用它来算（权重仍是 float32）",
    "max_grad_norm": "一步的改动太猛时，缩短到这么大",
    "save_every": "每学几遍保存、测量一次；没有就是全程平均十次",
    "batch_size": "一批几行，每行拼着几段对话",
    "minutes": "训练几分钟；没有就按 epochs",
    "warmup": "开头这么大比例的时间里，学习率慢慢升上去",
    "decay": "最后这么大比例的时间里，学习率慢慢降下来",
    "user_share": "回答之外，用户的话也学多大一部分；0 是只学回答",
    "grow": "开头这么大比例的时间里只用下面一半的层，省一半的功夫；其余的层随后加入",
    "dropout": "训练时随机丢掉这么大一部分，防止死记硬背；语料小、要学很多遍时用",
    "patience": "连着这么多次测量没有变好就停，留下最好的模型",
    "seed": "随机种子：其余都一样时，同一个种子训练出同样的结果",
    "tensorboard": "另外给 TensorBoard 写一份记录",
    "half": "权重存成 bfloat16，文件小一半",
}
MACHINE = {"device": "设备", "threads": "线程", "precision": "精度", "torch": "PyTorch", "python": "Python"}

TEMPLATE = """\
---
language:
- zh
{licence}
pipeline_tag: text-generation
tasks:
- text-generation
tags:
- studytiny
- chinese
- chat
- small-language-model
---

# {title}：StudyTiny 训练的中文小模型

这是用 StudyTiny 的 `python -m train` 训练的中文聊天小模型，一个 token 就是一个字；{state}。\
它小到能在普通笔记本电脑上训练和聊天，只会说简短的家常话。

> **请别当真。** 它只是照着语料学会了哪个字常跟着哪个字：会说错、编造、前后矛盾，语料里不雅的话也可能学会。\
不要把它的话当作事实，不要用于医疗、法律、理财、心理危机等需要正确回答的地方，也不要让它冒充真人。
{warning}
## 概况

{facts}

{corpora}

{cleaning}训练用的命令：

```bash
{command}
```

## 曲线

{picture}

- **损失**：在正学的字上错得多不多。每个点是一小段的平均，所以会抖，看平滑后的线就好。\
单位是奈特，乘 1.44 就是比特，可以大致和留出对话的那张图比。
- **留出对话的比特/字**：在从不参加训练的对话上测，是真本事。训练损失一直降、它却回头往上走，\
就是开始死记硬背（过拟合）了：该停下，或多找些语料。
- **学习率**先升上去，最后降下来，是设定好的；**速度**突然掉下去，多半是电脑在忙别的。

{measurements}

## 测得怎么样

{measured}

{measures}

拿什么来比？在 {vocabulary:,} 项词表里闭着眼乱猜，是 {guessing:.2f} 比特/字，学得越多就比它低得越多。\
语料越简单、越重复，这个数天然越低，所以**只有在同一份语料的同一批留出对话上测的，才能互相比**。\
想知道一个改动有没有用：只改一处，别的都不变，再训练一次，比这里的数，再读读下面的回答。

## 它说话的样子

{samples}

## 怎么用

在 StudyTiny 的文件夹里运行（模型搬了家，就把 `{shown}` 换成它现在的位置）：

```bash
# 和它聊天
python -m studytiny.chat --model {shown}
# 再测一遍
python -m train.evaluate {shown} --corpus {corpus}
# 训练被打断了，从断的地方接着来
python -m train --resume --out {shown}
# 重写这份报告
python -m train.report {shown}
```

## 训练设置

{settings}

## In English

A small Chinese chat model of {millions:.1f} million parameters, one token a character, trained from scratch with \
StudyTiny's `python -m train` on {names}; {english_state}. {english_bits} \
It makes short small talk, invents things and may be rude; its words are neither facts nor advice.{english_warning}
"""
WARNING = """
> **公开之前请先看许可。** 语料 {names} 没有写明开放的许可。小黄鸡这样没有许可的语料，\
语料本身和用它训练的模型都请不要上传、公开或转送；如果是您自己写的对话，公不公开由您决定。
"""
ENGLISH_WARNING = """ \
At least one corpus states no open licence: unless it is your own, do not publish or pass on this model."""
NO_MATPLOTLIB = """没有画曲线：写报告的电脑上没有 matplotlib。\
运行 `pip install matplotlib`，再运行 `python -m train.report {shown}`，就能补上。"""
ABOUT_SAMPLES = """同样的 20 句话，在训练的三个时刻各问一次；每句都是新的对话，回答一字未改。\
从左往右看它怎么学会说话；最后五句比闲聊难，说错很正常。
"""
NO_SAMPLES = "训练到三分之一、三分之二和结束时，会各问它同样的 20 句话，回答放在这里。现在还没有。"


def write_report(folder: str | Path) -> Path:
    """Writes README.md and, where matplotlib is there, curve.png from run.json, metrics.jsonl and samples.jsonl.

    Raises:
        UserError: run.json is missing or damaged.
    """
    folder = Path(folder)
    facts = read_facts(folder)
    training, measurements = read_metrics(folder)
    steps = max((line["step"] for line in training + measurements), default=0)
    shown = _shown(folder)
    licences = [str(row.get("license")) for row in facts.corpora]
    names = [str(row.get("name")) for row in facts.corpora]
    closed = [name for name, licence in zip(names, licences, strict=True) if licence not in OPEN_LICENCES]
    one = len(set(licences)) == 1 and not closed  # otherwise there is no one name for the licence
    bits = facts.evaluation.get("bits_per_char")
    text = TEMPLATE.format(
        licence=f"license: {OPEN_LICENCES[licences[0]]}" if one else "license: other\nlicense_name: see-below",
        title=_plain(folder.resolve().name),
        state="已经训练完" if facts.finished else "**还没有训练完**，下面是到目前为止的样子",
        warning=WARNING.format(names="、".join(map(_plain, closed))) if closed else "",
        facts=_facts_table(facts, steps),
        corpora=_corpora_table(facts.corpora),
        cleaning=_cleaning_table(facts.cleaning),
        command=" ".join(facts.command.split()),  # on one line it cannot end the block it stands in
        picture=_picture(folder, shown, bool(training)),
        measurements=_about_measurements([line["bits_per_char"] for line in measurements]),
        measured="在留出的对话（约 2%，由第一句话决定，训练时从不看）上测得。"
        if facts.evaluation
        else "训练完才测；现在还没有测。",
        measures=_table(
            ("测什么", "结果", "是什么意思"),
            ((name, _number(facts.evaluation.get(key), form), why) for key, (name, form, why) in MEASURES.items()),
            markdown=2,
        ),
        vocabulary=facts.vocabulary,
        guessing=math.log2(max(1, facts.vocabulary)),
        samples=_samples_table(read_samples(folder)),
        shown=shown,
        corpus=_quoted(names[0] if names else "语料"),
        settings=_table(
            ("设置", "值", "意思"),
            ((name, _setting(value), SETTINGS.get(name, "—")) for name, value in facts.settings.items()),
        ),
        millions=facts.parameters / 1e6,
        names=_plain(", ".join(names)) or "an unnamed corpus",
        english_state=f"{steps:,} steps, {facts.minutes:.1f} minutes, {'' if facts.finished else 'not yet '}finished",
        english_bits=f"Held-out bits per character: {_number(bits, '{:.3f}')}." if bits else "Not yet evaluated.",
        english_warning=ENGLISH_WARNING if closed else "",
    )
    write_atomically(folder / REPORT_FILE, text)
    return folder / REPORT_FILE


def _picture(folder: Path, shown: str, started: bool) -> str:
    if not started:
        return "还没有训练记录；训练开始后，这里会有曲线。"
    try:
        return f"![训练曲线：损失、留出对话的比特/字、学习率、速度]({plot(folder).name})"
    except ImportError:
        return NO_MATPLOTLIB.format(shown=shown)


def _facts_table(facts: RunFacts, steps: int) -> str:
    unknown = "" if facts.unknown_rate is None else f"；训练语料里有 {facts.unknown_rate:.2%} 的字不在里面"
    going_on = "" if facts.finished else "（还没有训练完）"
    machine = [f"{MACHINE.get(name, name)} {value}" for name, value in facts.machine.items()]
    rows = [
        ("大小", f"{facts.preset}：{facts.parameters / 1e6:.1f} 百万个参数（训练要调的数）"),
        ("词表", f"{facts.vocabulary:,} 项{unknown}"),
        ("学了多少", f"每遍读 {facts.tokens:,} 个字，其中 {facts.labels:,} 个要学着说"),
        ("用时", f"{facts.minutes:.1f} 分钟，{steps:,} 步{going_on}"),
        ("电脑", "，".join(machine) or "—"),
    ]
    return _table(("项目", "内容"), rows)


def _corpora_table(corpora: Iterable[Mapping[str, Any]]) -> str:
    counts = ("dialogues", "training", "held_out")
    return _table(
        ("语料", "许可", "对话（段）", "用来训练", "留出来测"),
        (
            [row.get("name"), row.get("license") or "没有说明", *(_number(row.get(key)) for key in counts)]
            for row in corpora
        ),
    )


def _cleaning_table(cleaning: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [row.get("name"), row.get("title"), _number(row.get("changed"))]
        + [
            f"{_number(row.get(f'{what}_before'))} → {_number(row.get(f'{what}_after'))}"
            for what in ("dialogues", "turns", "characters")
        ]
        for row in cleaning
    ]
    table = _table(("规则", "做什么", "改动几段", "段数", "句数", "字数"), rows)
    return f"训练前按这些规则清洗了语料：\n\n{table}\n\n" if rows else ""


def _about_measurements(bits: Sequence[float]) -> str:
    if not bits:
        return "训练中还没有在留出的对话上测过。"
    verdict = "最近一次就是最好的，或与最好的差不到 0.01"
    if bits[-1] > min(bits) + 0.01:
        verdict = f"最好的一次 {min(bits):.3f}；最近一次不是最好的，可能已经开始死记硬背"
    return (
        f"训练中测了 {len(bits)} 次：第一次 {bits[0]:.3f} 比特/字，最近一次 {bits[-1]:.3f}；{verdict}。"
        "（训练中为了省时间，可能只测了留出对话的一部分，与下一节的数会有些出入。）"
    )


def _samples_table(lines: Iterable[Mapping[str, Any]]) -> str:
    stages = {line["stage"]: line for line in lines}  # a stage run again replaces the earlier one
    if not stages:
        return NO_SAMPLES
    replies = {stage: {str(prompt): str(reply) for prompt, reply in line["replies"]} for stage, line in stages.items()}
    titles = {1: "训练到三分之一", 2: "训练到三分之二", 3: "训练结束"}
    heads = [
        f"{name}（第 {stages[stage]['step']:,} 步）" if stage in stages else name for stage, name in titles.items()
    ]
    # HTML, not a Markdown table: inside it no Markdown of the model comes alive, and escaping HTML is a settled matter.
    table = ["<table>", "<tr><th>您说</th>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for prompt in dict.fromkeys(prompt for said in replies.values() for prompt in said):
        cells = [_text_in_html(prompt)]
        for stage in titles:
            reply = replies.get(stage, {}).get(prompt)
            cells.append("—" if reply is None else _text_in_html(reply) or "<i>（什么也没说）</i>")
        table.append("<tr><td>" + "</td><td>".join(cells) + "</td></tr>")
    return "\n".join([ABOUT_SAMPLES, *table, "</table>"])


# ---- from values to text that stays text ----


def _shown(folder: Path) -> str:
    """The folder as a command names it; only its name if the path is absolute, which may say whose computer it was."""
    personal = folder.is_absolute() or ".." in folder.parts or not folder.name
    return _quoted(folder.resolve().name if personal else folder.as_posix())


def _quoted(argument: str) -> str:
    return f'"{argument}"' if re.search(r"[\s&()|;<>']", argument) else argument


def _number(value: Any, form: str = "{:,}") -> str:
    return form.format(value) if isinstance(value, (int, float)) else UNKNOWN


def _setting(value: Any) -> str:
    return "—" if value is None else "是" if value is True else "否" if value is False else str(value)


def _plain(text: object) -> str:
    """``text`` on one line of Markdown, in which nothing of it is markup."""
    escaped = re.sub(r"([\\`*_~#$\[\]])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))
    return escaped.replace("|", "&#124;")


def _text_in_html(text: str) -> str:
    """``text`` as the content of an HTML element; a blank line would end the table for Markdown, so none is left."""
    return re.sub(r"\s*[\x00-\x1f\x7f-\x9f\u2028\u2029]+\s*", "<br>", html.escape(text.strip()))


def _table(header: Sequence[str], rows: Iterable[Sequence[object]], markdown: int | None = None) -> str:
    """A Markdown table; only the column numbered ``markdown`` holds our own words, with markup."""
    lines = [header, ["---"] * len(header)]
    lines += [[str(cell) if i == markdown else _plain(cell) for i, cell in enumerate(row)] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = CommandParser(
        "python -m train.report", "按训练留下的记录，重写模型文件夹里的报告：README.md 和 curve.png。"
    )
    parser.add_argument("folder", metavar="模型文件夹", help="训练得到的文件夹")
    path = write_report(parser.parse_args().folder)
    print(f"报告写好了：{path}")


if __name__ == "__main__":
    run_command(main)
