"""Chat in the terminal: ``python -m studytiny.chat [--model NAME_OR_FOLDER] [--temperature T] ...``

Every reply is streamed and remembered. ``exit``, ``quit`` or ``bye`` leaves, and so does the end of the input; Ctrl-C
stops a reply, or leaves when nothing is being said. ``STUDYTINY_FILTER=1`` drops rude replies (``studytiny.safety``).
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Sequence

from studytiny.command import CommandParser, number, run_command
from studytiny.errors import UserError
from studytiny.generator import Generator
from studytiny.hub import BundledModelUsed, load_model
from studytiny.safety import is_filter_on, safe_stream
from studytiny.sampling import SamplingConfig

LEAVE = {"exit", "quit", "bye"}
YOU, MODEL = "你：", "StudyTiny："
_NAMES = {"bundled": "自带小模型", "StudyTinyModel": "StudyTinyModel（原作者发布）"}
_ARCHITECTURES = {
    "studytiny": "studytiny 架构，会读前面的对话",
    "published": "published 架构，看不见上下文，只凭上一个字接下一个字",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, loads the model and chats until the user leaves."""
    options = build_parser().parse_args(arguments)
    sampling = SamplingConfig(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
    )
    generator = load_generator(options.model, options.device)
    print("exit、quit 或 bye 退出；Ctrl-C 停止正在说的话。模型很小，会胡说八道，请别当真。\n")
    chat(generator, sampling)


def load_generator(name: str, device: str) -> Generator:
    """Loads the model called ``name`` and tells which one answers; the bundled one may stand in for StudyTinyModel."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BundledModelUsed)
        generator = Generator(*load_model(name, device))
    for warning in caught:
        if issubclass(warning.category, BundledModelUsed):
            print(f"提示：{warning.message}", file=sys.stderr)
            name = "bundled"
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    model = generator.model
    print(f"正在回答的是：{_NAMES.get(name, name)}（{_ARCHITECTURES[model.architecture]}）。")
    return generator


def chat(generator: Generator, sampling: SamplingConfig) -> None:
    """Reads messages from stdin and answers each, with all that was said before, until the user leaves."""
    messages: list[dict[str, str]] = []
    while True:
        try:
            said = input(YOU)
        except (EOFError, KeyboardInterrupt):
            print()
            break
        said = said.strip().removeprefix("\N{BYTE ORDER MARK}").strip()  # PowerShell puts one before what it pipes
        if said.lower() in LEAVE:
            break
        if not said:
            continue
        question = {"role": "user", "content": said}
        try:
            reply = speak(generator, [*messages, question], sampling)
        except UserError as error:
            print(f"提示：{error}", file=sys.stderr)
            continue
        messages += [question, {"role": "assistant", "content": reply}]
    print("再见！")


def speak(generator: Generator, messages: Sequence[dict[str, str]], sampling: SamplingConfig) -> str:
    """Prints the reply as it comes and returns it; Ctrl-C cuts it short.

    Raises:
        UserError: before anything is printed: the message cannot be answered.
    """
    texts = safe_stream(generator, messages, sampling, filtered=is_filter_on("terminal"))
    print(MODEL, end="", flush=True)
    reply = ""
    try:
        for text in texts:
            if not text.startswith(reply):  # a rude one was dropped
                print(f" ……（换一句）\n{MODEL}", end="")
                reply = ""
            print(text[len(reply) :], end="", flush=True)
            reply = text
        print()
    except KeyboardInterrupt:
        print(" ……（已停止）")
    finally:
        texts.close()
    return reply


def build_parser() -> CommandParser:
    """The command line, explained in Chinese."""
    defaults = SamplingConfig()
    parser = CommandParser(
        "python -m studytiny.chat",
        "在终端里和模型聊天：回复逐字显示，记得前面说过的话。",
        epilog="输入 exit、quit 或 bye 退出；按 Ctrl-C 停止正在说的话，没有在说时则退出。",
    )
    parser.add_argument(
        "--model",
        default="bundled",
        metavar="名字或文件夹",
        help="bundled（自带，默认）、StudyTinyModel 或一个模型文件夹",
    )
    parser.add_device()

    def setting(flag: str, kind: type, explanation: str) -> None:
        default = getattr(defaults, flag.removeprefix("--").replace("-", "_"))
        shown = "" if default is None else f"（默认 {default}）"
        metavar = "整数" if kind is int else "数"
        parser.add_argument(flag, type=number(kind), default=default, metavar=metavar, help=explanation + shown)

    setting("--temperature", float, "温度：低则稳，高则敢，0 表示每次都选最有把握的字")
    setting("--top-k", int, "只在最有把握的前几个字里挑，0 表示不限制")
    setting("--top-p", float, "只留下概率加起来够这么多的几个字，1 表示不限制")
    setting("--repetition-penalty", float, "让回复里用过的字更难再出现，1 表示不管")
    setting("--max-new-tokens", int, "一条回复最多多少个字")
    setting("--seed", int, "随机种子：同一个数、同样的话得到同样的回复")
    return parser


if __name__ == "__main__":
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - arrow keys and history at the prompt, where Python has it
    run_command(main)
