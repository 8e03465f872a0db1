"""Every text of the page, Chinese and English side by side, and the sentences of errors in the visitor's language.

English here serves the page only: the library itself speaks Chinese, and ``explain`` knows how to say its sentences in
English.
"""

from __future__ import annotations

import re

LANGUAGES = {"zh": "中文", "en": "English"}
DEFAULT_LANGUAGE = "zh"

# What a Chinese or another browser calls its language, for gr.I18n; it falls back to "en" for all others.
_LOCALES = {"zh": ("zh", "zh-CN", "zh-TW", "zh-HK"), "en": ("en",)}

TEXTS: dict[str, tuple[str, str]] = {
    # the head of the page
    "tagline": (
        "小到能看懂的中文聊天模型，一个字一个字地写",
        "A Chinese chat model small enough to understand, one character at a time",
    ),
    "language": ("语言", "Language"),
    "links": (
        "[原模型 StudyTinyModel](https://modelscope.cn/models/fenuolian/StudyTinyModel)"
        " · 你说的话只在运行本页的电脑上处理",
        "[The original StudyTinyModel](https://modelscope.cn/models/fenuolian/StudyTinyModel) · "
        "What you write is processed only on the computer that runs this page",
    ),
    # the chat
    "chat": ("对话", "Chat"),
    "placeholder": (
        "### 来聊两句吧\n点一句话开始，或者在下面自己写。",
        "### Say something\nPick a line to begin, or write your own below. The models speak Chinese.",
    ),
    "message": ("想说的话", "Your message"),
    "message_hint": ("说点什么…… 按回车发送", "Write in Chinese… Enter sends"),
    "stop": ("停止", "Stop"),
    "send": ("发送", "Send"),
    "caution": (
        "模型很小，会胡说八道，请别当真。",
        "This is a very small model. It may talk nonsense: do not rely on what it says.",
    ),
    "speed": ("刚才每秒写 {speed:.0f} 字。", " It just wrote {speed:.0f} characters a second."),
    "in_line": (
        "现在人多，前面还有 {count} 个在等；轮到你就答。",
        "It is busy: {count} are waiting before you. You are answered in turn.",
    ),
    "answering": ("正在回答的是：{model}。", "Answering: {model}."),
    # models
    "model": ("模型", "Model"),
    "model_info": ("换模型不会丢掉已有的对话。", "Changing the model keeps the conversation."),
    "model_bundled": ("自带小模型", "Bundled mini model"),
    "model_published": ("StudyTinyModel（原作者发布）", "StudyTinyModel (as published)"),
    "model_run": ("我训练的：{name}", "Trained here: {name}"),
    "note_studytiny": (
        "架构：`studytiny`。会读前面的对话，再写下一个字。",
        "Architecture: `studytiny`. It reads the conversation so far, then writes the next character.",
    ),
    "note_published": (
        "架构：`published`，和原作者发布的一模一样。它看不见上下文，只凭上一个字和位置接下一个字，所以常常答非所问。",
        "Architecture: `published`, exactly as its author released it. It cannot see the context: it goes by the last "
        "character and its place alone, so its answers often miss the point.",
    ),
    # the download of StudyTinyModel
    "download_connecting": (
        "正在连接 ModelScope，准备下载 StudyTinyModel……",
        "Connecting to ModelScope to download StudyTinyModel…",
    ),
    "download_running": (
        "正在下载 StudyTinyModel：{percent}%（{done:.0f} / {total:.0f} MB）。可以先和自带模型聊。",
        "Downloading StudyTinyModel: {percent}% ({done:.0f} of {total:.0f} MB). Chat with the bundled model meanwhile.",
    ),
    "download_converting": ("下载完成，正在检查和转换……", "Downloaded; checking and converting…"),
    "download_ready": (
        "StudyTinyModel 准备好了，可以在上面的列表里选它。",
        "StudyTinyModel is ready: choose it in the list above.",
    ),
    "download_failed": (
        "没能下载 StudyTinyModel（原因和办法）",
        "StudyTinyModel could not be downloaded (why, what to do)",
    ),
    "download_failed_more": (
        "{reason}。也可以用浏览器打开 {page}，下载 model_epoch_2.pt 和 vocab.txt，再运行 "
        "python -m studytiny.import_published model_epoch_2.pt vocab.txt runs/StudyTinyModel，"
        "刷新本页就能在列表里选它。",
        "{reason}. You can also open {page} in a browser, download model_epoch_2.pt and vocab.txt, run "
        "python -m studytiny.import_published model_epoch_2.pt vocab.txt runs/StudyTinyModel "
        "and reload this page: it is then in the list.",
    ),
    "download_again": ("重新下载", "Try the download again"),
    # settings
    "settings": (
        "**它怎么挑下一个字**　改动从下一条消息起生效",
        "**How it picks the next character** · acts on the next message",
    ),
    "temperature": ("温度", "Temperature"),
    "temperature_info": (
        "低：稳，老选最有把握的字；高：敢，更出人意料也更容易乱说；0：每次都选第一名。",
        "Low plays safe, high dares and rambles more; 0 always takes its first choice.",
    ),
    "top_k": ("候选字数（top-k）", "Candidates (top-k)"),
    "top_k_info": (
        "只在最有把握的前几个字里挑；1 最死板，0 表示不限制。",
        "Picks only among its best few characters; 1 is the strictest, 0 means no limit.",
    ),
    "repetition_penalty": ("重复惩罚", "Repetition penalty"),
    "repetition_penalty_info": (
        "让这条回复里用过的字更难再出现；1 表示不管。",
        "Makes characters already used in this reply less likely; 1 is off.",
    ),
    "max_new_tokens": ("最大长度", "Maximum length"),
    "max_new_tokens_info": (
        "一条回复最多写多少个字；说完了会自己提前停下。",
        "The most characters a reply may have; it stops earlier when it has finished.",
    ),
    "more": ("更多设置", "More settings"),
    "top_p": ("累计概率（top-p）", "Cumulative probability (top-p)"),
    "top_p_info": (
        "只留下概率加起来够这么多的几个字；1 表示不限制。",
        "Keeps only the best characters that together reach this probability; 1 means no limit.",
    ),
    "seed": ("随机种子", "Random seed"),
    "seed_info": (
        "填同一个整数、说同样的话，就得到同样的回复；留空则每次不同。",
        "The same whole number and the same words give the same reply; leave it empty for a new one each time.",
    ),
    "reset": ("恢复默认设置", "Reset the settings"),
    # the tabs
    "tab_chat": ("聊天", "Chat"),
    "tab_xray": ("透视", "X-ray"),
    # X-ray
    "xray_intro": (
        "**透视**：模型一次只写一个字，写每个字以前都给所有的字打分。这里把打分摊开来看：点回答里的任何一个字，"
        "看它当时还想写什么，又看了前面的哪些字。",
        "**X-ray**: the model writes one character at a time, and before each it gives every character a score. Click "
        "any character of a reply to see what else it might have written, and which earlier characters it looked at.",
    ),
    "xray_empty": (
        "还没有回答可看：先去“聊天”里说一句话，再回来。",
        "No reply to look at yet: say something in the Chat tab first, then come back.",
    ),
    "which_reply": ("看哪一句回答", "Which reply"),
    "which_reply_info": (
        "聊天里模型说过的话；它是照现在选的模型重新读一遍的。",
        "What the model said in the chat; the model chosen there now reads the conversation once more.",
    ),
    "xray_reply": (
        "回答：颜色越深，模型写这个字时越有把握",
        "The reply: the deeper the colour, the surer the model was of that character",
    ),
    "place": ("第几个字", "Which character"),
    "place_info": ("也可以直接点上面的字。", "Or click a character above."),
    "mark_user": ("用户：", "user:"),
    "mark_assistant": ("模型：", "assistant:"),
    "mark_end": ("（说完）", "(end)"),
    "mark_unknown": ("（不认识的字）", "(unknown)"),
    "role_user": ("用户", "user"),
    "role_assistant": ("模型", "assistant"),
    "candidates_intro": (
        "**它当时想写什么**：每行是一个候选的字，第一列是模型自己给的概率，往右是每个滑块依次改过以后的概率。"
        "“–”是不可能被抽到；底色的那一行是回答里真正写的字。",
        "**What it might have written**: a row for each candidate; the first column is the model's own probability, "
        "the next ones what each slider makes of it, in this order. “–” can never be drawn; the tinted row is what the "
        "reply has there.",
    ),
    "candidate": ("字", "Character"),
    "stage_raw": ("模型给的", "model"),
    "stage_penalty": ("重复惩罚", "penalty"),
    "stage_temperature": ("温度", "temperature"),
    "stage_top_k": ("top-k", "top-k"),
    "stage_top_p": ("top-p", "top-p"),
    "stands_here": ("回答里写的就是它", "This is what the reply has here"),
    "verdict": (
        "第 {place} 个字，照现在的滑块最可能写“{token}”：{percent}。",
        "Character {place}: with these settings, “{token}” is most likely, {percent}.",
    ),
    "xray_settings": (
        "**换一种挑法**　拖一拖，表格马上变，不用重写",
        "**Pick differently** · the table changes at once, nothing is written anew",
    ),
    "other_candidate": ("把这个字换成", "Put another one in its place"),
    "go_on": ("从这里接着写", "Let it go on from here"),
    "what_if": (
        "这是换了一个字以后的另一种可能；聊天里的那一句没有变。",
        "This is how it could have gone on after another character; the reply in the chat stays as it is.",
    ),
    "what_if_help": (
        "这样的话要认真对待，回答是写好的，不让模型来接着写。",
        "Such a message is taken seriously: its answer is a fixed one, and the model does not go on with it.",
    ),
    "what_if_rude": (
        "这样接着写出来的话不太文明，就不显示了；换一个字再试试。",
        "What came of it was rude and is not shown; try another character.",
    ),
    "attention_intro": (
        "**它看了哪些字**：每一层的每个头，写这个字以前会去前面的字里收集信息。颜色越深，从那里收集得越多。"
        "有的头只看前一个字，有的头会去找“上次出现这个字时，后面跟着什么”：名字就是这样抄来的。",
        "**Where it looked**: before a character is chosen, each head of each layer gathers information from earlier "
        "ones; the deeper the colour, the more from there. Some heads look one place back, some look for what followed "
        "the last time: that is how a name is copied.",
    ),
    "layer": ("第几层", "Layer"),
    "head": ("第几个头", "Head"),
    "looked_at": ("写这个字以前读到的一切", "Everything read before this character"),
    "blind": (
        "这个架构（`published`）的注意力没有用在前面的字上：它只看上一个字和位置，所以没有什么可画的，也记不住你说过的话。",
        "The attention of this architecture (`published`) never reaches earlier characters: it sees the last character "
        "and its place only. So there is nothing to draw, and it cannot remember what you said.",
    ),
    "tokens": ("文字怎样变成编号", "How text becomes numbers"),
    "tokens_intro": (
        "模型不认识字，只认识编号：一个字一个编号，再加上谁在说话、说完了没有的记号。在下面写几个字试试。",
        "A model knows no characters, only numbers: one for each character, and marks for who speaks and where a turn "
        "ends. Type something below.",
    ),
    "tokens_text": ("一句话", "A sentence"),
    "tokens_hint": ("比如：你好，我叫小明", "A few words, Chinese or not"),
    "token_headers": ("位置|字|编号|谁说的", "place|token|id|speaker"),
    # side by side
    "tab_compare": ("对比", "Compare"),
    "compare_intro": (
        "**对比**：同一句话，说给两个模型听，或者说给同一个模型的两种设置听，看它们怎么答。"
        "比如换成 StudyTinyModel，先说名字，隔一句再问。",
        "**Compare**: say the same to two models, or to one with two settings, and see how they answer. Try "
        "StudyTinyModel: tell it your name, and ask for it a little later.",
    ),
    "compare_hint": ("说给两边听…… 按回车发送", "Say it to both… Enter sends"),
    "compare_clear": ("清空两边", "Clear both"),
    "compare_settings": ("这一边的设置", "Settings of this side"),
    # training
    "tab_train": ("训练", "Train"),
    "train_intro": (
        "**训练**：从零开始教一个模型说话，就在这台电脑上。它一遍遍猜语料里的下一个字，猜错了就改一改自己的参数；"
        "曲线往下走，就是猜得越来越准。关掉网页，训练照常进行。",
        "**Training**: teach a model to speak from nothing, on this computer. Again and again it guesses the next "
        "character of the corpus, and is corrected a little where it was wrong; the curves fall as it gets better. "
        "Training goes on when you close the page.",
    ),
    "corpus_file": ("自己的语料（.conv 文件）", "A corpus of your own (.conv file)"),
    "corpus_info": (
        "不放文件，就学自带的语料。格式：每段对话前一行 `E`，每句话一行 `M 文字`，用户先说，然后轮流。",
        "Without a file it learns the corpus that comes along. Format: a line `E` before each dialogue, then a line "
        "`M text` for each turn, the user's first.",
    ),
    "preset": ("大小", "Size"),
    "preset_info": (
        "mini 是自带模型的大小，几分钟就会说话；standard 和原模型一样大，慢得多。",
        "mini is as large as the bundled model and speaks after minutes; standard is as large as the original, and "
        "much slower.",
    ),
    "minutes": ("训练几分钟", "Minutes"),
    "minutes_info": (
        "10 分钟就能说几句；一小时好得多。",
        "Ten minutes are enough for a few words; an hour is far better.",
    ),
    "train_start": ("开始训练", "Start training"),
    "train_stop": ("停下并保存", "Stop and save"),
    "train_resume": ("接着训练", "Go on with it"),
    "resume_which": ("没做完的训练", "Unfinished runs"),
    "train_none": ("还没有开始训练。", "Nothing is being trained."),
    "train_starting": (
        "**{name}**：正在准备语料和模型，要几十秒……",
        "**{name}**: preparing the corpus and the model; this takes up to a minute…",
    ),
    "train_running": ("**{name}**：正在训练。", "**{name}**: training."),
    "train_stopping": ("**{name}**：正在保存，马上停下……", "**{name}**: saving, then it stops…"),
    "train_stopped": (
        "**{name}**：停下了，都保存好了，随时可以接着训练。",
        "**{name}**: stopped and saved; you can go on with it at any time.",
    ),
    "train_finished": ("**{name}**：训练好了。", "**{name}**: done."),
    "train_dropped": (
        "**{name}**：停下了；还没来得及保存，要练请重新开始。",
        "**{name}**: stopped before there was anything to save; start anew to train.",
    ),
    "train_failed": (
        "**{name}**：没能训练下去。{sentence}",
        "**{name}**: training broke off. {sentence}",
    ),
    "train_numbers": (
        "已练 {minutes:.1f} 分钟、{steps} 步，每秒 {speed:.0f} 字。",
        "{minutes:.1f} minutes, {steps} steps, {speed:.0f} characters a second so far.",
    ),
    "train_bits": (
        "没学过的对话上 {bits:.2f} 比特/字（越低越好）。",
        "{bits:.2f} bits per character on dialogues it never saw (lower is better).",
    ),
    "chat_with": ("和它聊天", "Chat with it"),
    "loss_curve": ("猜错的程度（学过的对话，每字 nat）", "Loss on what it learns from (nats per character)"),
    "bits_curve": ("没学过的对话（每字几比特）", "On held-out dialogues (bits per character)"),
    "steps": ("步", "steps"),
    "train_samples": ("它学说话", "Learning to speak"),
    "prompt": ("你说", "You say"),
    "stages": ("学了三分之一时|学了三分之二时|学完时", "after a third|after two thirds|at the end"),
    "doctor": ("语料体检", "The corpus doctor's report (in Chinese)"),
    # lessons
    "tab_lessons": ("课程", "Lessons"),
    "lessons_intro": (
        "**课程**：六节短课，从一个字讲到一段对话，再讲到怎样学会说话。每一课是一个能运行的小程序，改一改，再运行，看看变了什么。",
        "**Lessons**: six short ones, from a character to a conversation and to how it is learnt. Each is a small "
        "program to run, change and run again. They are in Chinese.",
    ),
    "lesson": ("哪一课", "Lesson"),
    "lesson_run": ("在下载来的项目里运行它：", "Run it in a copy of the project:"),
    # about
    "tab_about": ("关于", "About"),
    "model_card": ("自带模型的说明书", "Card of the bundled model (in Chinese)"),
    "about": (
        "## 这是什么\n"
        "StudyTiny 是一个小到可以整个看懂的中文聊天模型，给想弄明白“大模型”怎么回事的人。一个 token 就是一个字："
        "它读的每个字、写的每个字、写以前想过的别的字，都能在“透视”里看到；“训练”里可以从零教一个自己的。\n\n"
        "## 有哪两种模型\n"
        "- **自带小模型**：几百万个参数，在笔记本电脑上用本项目自己写的对话训练出来，看得见前面说过的话。\n"
        "- **StudyTinyModel**：StudyGPT 原作者发布在 ModelScope 上的模型，约 2000 万个参数，用小黄鸡语料训练。"
        "它的注意力算错了方向，看不见上文；这里照原样运行，好让人比较。\n\n"
        "## 它做不到什么\n"
        "它太小，会答非所问、会说错，不知道新闻、时间和天气，不会算大数。别拿它的话当真，尤其是健康、法律、钱的事。"
        "难过得撑不住的时候，请找信任的人；在中国大陆可以打心理援助热线 12356。\n\n"
        "## 你的话去了哪里\n"
        "只在运行本页的电脑上处理，不写进文件，不传给别处；对话留在你的浏览器里，打开“透视”时，你看的那一段也暂时留在"
        "这台电脑的内存里。上传来训练的语料，留在它的 runs 文件夹里。\n\n"
        "## 许可\n"
        "代码和自带模型用的语料：[Apache-2.0](https://www.apache.org/licenses/LICENSE-2.0)"
        "（见仓库里的 LICENSE 和 DATA_LICENSES.md）。小黄鸡语料没有许可声明，"
        "不随本项目分发。",
        "## What this is\n"
        "StudyTiny is a Chinese chat model small enough to be understood whole, for people who want to know how "
        "language models work. One token is one character: all that it reads and writes, and what else it considered, "
        "can be seen in X-ray; in Train you can teach one of your own.\n\n"
        "## Two models\n"
        "- **The bundled model**: a few million parameters, trained on a laptop on dialogues written by this project. "
        "It sees what was said before.\n"
        "- **StudyTinyModel**: published on ModelScope by the author of StudyGPT, about 20 million parameters, trained "
        "on the Xiaohuangji corpus. Its attention runs in the wrong direction, so it cannot see the context; it runs "
        "here exactly as published, for comparison.\n\n"
        "## What it cannot do\n"
        "It is very small: it misses the point, gets things wrong, knows no news, time or weather, and cannot "
        "calculate. Do not rely on it, least of all in matters of health, law or money. If you are in despair, please "
        "talk to someone you trust; in mainland China the support line is 12356.\n\n"
        "## Where your words go\n"
        "They are processed on the computer that runs this page, not written to files and not sent on. The "
        "conversation stays in your browser; what you look at in X-ray is also in that computer's memory for a while, "
        "and a corpus uploaded for training stays in its runs folder.\n\n"
        "## Licences\n"
        "Code, and the corpus of the bundled model: [Apache-2.0](https://www.apache.org/licenses/LICENSE-2.0) "
        "(see LICENSE and DATA_LICENSES.md in the repository). "
        "The Xiaohuangji corpus states no licence and is not distributed here.",
    ),
    "code": ("本页的全部代码：", "All the code of this page:"),
    # what goes wrong
    "empty_message": ("先写一句话再发送吧。", "Write something first, then send it."),
    "message_too_long": (
        "这条消息有 {length} 个字，最多能发 {limit} 个字；请缩短或分几次说，写好的内容还在输入框里。",
        "This message has {length} characters, at most {limit} can be sent; shorten it or send it in parts. "
        "Your text is still in the box.",
    ),
    "unknown_model": (
        "没有叫 {name} 的模型；请从列表里选一个。",
        "There is no model called {name}; choose one from the list.",
    ),
}

EXAMPLES: tuple[tuple[str, str], ...] = (  # what is sent, and what it means
    ("你好！", "Hello!"),
    ("你是谁？", "Who are you?"),
    ("你喜欢吃什么？", "What do you like to eat?"),
    ("我今天有点累。", "I am a bit tired today."),
)

# The library's Chinese sentences that a visitor can meet, and how they read in English.
_ENGLISH_ERRORS: tuple[tuple[str, str], ...] = (
    (
        r"这句话有 (\d+) 个字，这个模型一次最多读 (-?\d+) 个字.*",
        r"Your message has \1 characters; this model reads at most \2 at once. Shorten it or send it in parts.",
    ),
    (r"现在提问的人太多.*", "Too many people are asking right now; please try again in a moment."),
    (
        r"这条回复有 (\d+) 秒没有人接着读.*",
        r"Nobody read this reply for \1 seconds, so it was stopped; please ask again.",
    ),
    (r"这个生成器已经关闭.*", "This model was put away in the meantime; please ask again."),
    (r"模型算出的不是数.*", "The model's numbers are broken (NaN); choose another model or train it again."),
    (r"消息是空的.*", "The message is empty; write something first."),
    (r"要看的对话应以模型的回答结尾.*", "The conversation to look at must end with a reply."),
    (
        r"这一问一答有 (\d+) 个标记，模型一次最多读 (\d+) 个.*",
        r"This question and its reply have \1 tokens; the model reads at most \2 at once. Choose a shorter one.",
    ),
    (r"没有第 (\d+) 层第 (\d+) 个头.*", r"There is no head \2 in layer \1."),
    (r"大小只能是 (.*?)，.*", r"The size must be one of: \1."),
    (r"训练几分钟应是大于 0、不超过 (\d+) 的数.*", r"Minutes must be a number above 0 and at most \1."),
    (r"(.*) 还在训练；.*", r"\1 is still training; one at a time: wait for it, or stop it first."),
    (r"这次训练没有可以接着做的存档.*", "There is nothing to go on with; choose another run or start anew."),
    (r"回答的开头要由字组成.*", "This reply is too long to go on from here; choose an earlier character."),
    (r"对话的最后一句应是用户说的话.*", "The conversation must end with something the user said."),
    (r"每条消息应是.*", 'Every message must look like {"role": "user", "content": "text"}.'),
    (r"不认识的角色 (.*)；.*", r"Unknown role \1; only user and assistant are possible."),
    (
        r"(\w+)(?:（.*?）)? 应是大于 (\S+)、不超过 (\S+) 的数，收到的是 (.*)。",
        r"\1 must be a number above \2 and at most \3, not \4.",
    ),
    (r"(\w+)(?:（.*?）)? 应是 (\S+) 到 (\S+) 的数，收到的是 (.*)。", r"\1 must be a number from \2 to \3, not \4."),
    (
        r"(\w+)(?:（.*?）)? 应是 (\S+) 到 (\S+) 的整数，收到的是 (.*)。",
        r"\1 must be a whole number from \2 to \3, not \4.",
    ),
    (
        r".*不是模型文件夹.*|.*已损坏.*|找不到 .*",
        "This model's folder is incomplete or damaged; copy it again or choose another model.",
    ),
)


def pick_language(tag: object) -> str:
    """``zh`` or ``en`` for a browser's language such as ``zh-CN`` or ``en-GB``; Chinese when it says nothing."""
    if not isinstance(tag, str) or not tag.strip():
        return DEFAULT_LANGUAGE
    return "zh" if tag.strip().lower().startswith("zh") else "en"


def text(key: str, language: str, **values: object) -> str:
    """The text called ``key``; ``values`` fill its braces."""
    chinese, english = TEXTS[key]
    template = chinese if language == "zh" else english
    return template.format(**values) if values else template


def translations() -> dict[str, dict[str, str]]:
    """The tables for ``gr.I18n``, so that the first paint is already in the browser's language."""
    tables = {}
    for language, locales in _LOCALES.items():
        table = {key: text(key, language) for key in TEXTS}
        tables.update(dict.fromkeys(locales, table))
    return tables


def explain(error: Exception, language: str) -> str:
    """The library's sentence in the visitor's language; a sentence it has no English for stays Chinese."""
    sentence = str(error)
    if language == "zh":
        return sentence
    for pattern, english in _ENGLISH_ERRORS:
        match = re.fullmatch(pattern, sentence, flags=re.DOTALL)
        if match:
            return match.expand(english)
    return sentence
