"""The folder to upload to a host: ``python -m studytiny.hosting space|studio OUT``.

``space`` is a Hugging Face Space, ``studio`` a ModelScope studio (创空间). Both run app.py on a small machine without a
GPU; what they want to know stands in the README's head, and for a studio also in ms_deploy.json.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from studytiny.command import CommandParser, run_command
from studytiny.errors import UserError
from studytiny.hub import MODEL_ID

REPOSITORY = Path(__file__).resolve().parents[1]
CONTENT = ("app.py", "studytiny", "train", "lessons", "assets", "LICENSE", "DATA_LICENSES.md")
GRADIO_VERSION = "6.31.0"  # what the tests run with; a studio may have another 6.x
TESTS_HEADING = "# 测试"  # what follows it in requirements.txt is not needed to run the page
HEADS = {
    "space": f"""\
title: StudyTiny
emoji: 🔍
colorFrom: green
colorTo: blue
sdk: gradio
sdk_version: {GRADIO_VERSION}
python_version: "3.11"
app_file: app.py
license: apache-2.0
pinned: false
short_description: 看得懂的小型中文聊天模型
tags:
- chinese
- chat
- education
""",
    "studio": f"""\
domain:
- nlp
tags:
- 中文对话
- 教学
models:
- {MODEL_ID}
license: Apache License 2.0
deployspec:
  entry_file: app.py
""",
}
BODY = """\
# StudyTiny

小到可以整个看懂的中文聊天模型：和它聊天，也能看到它怎么一个字一个字地写。

A Chinese chat model small enough to be understood whole: chat with it, and see how it writes, character by character.
"""
DEPLOYMENT = {
    "$schema": "https://modelscope.cn/api/v1/studios/deploy_schema.json",
    "sdk_type": "gradio",
    "sdk_version": GRADIO_VERSION,
    "resource_configuration": "platform/2v-cpu-16g-mem",
    "base_image": "ubuntu22.04-py311-torch2.3.1-modelscope1.31.0",
}


def is_hosted() -> bool:
    """Whether this is a Hugging Face Space or a ModelScope studio, by what they set in the environment."""
    return bool(os.environ.get("SPACE_ID")) or os.environ.get("MODELSCOPE_ENVIRONMENT") == "studio"


def code_address() -> str | None:
    """Where the code of this page can be read, if a host says so."""
    space = os.environ.get("SPACE_ID")
    return f"https://huggingface.co/spaces/{space}/tree/main" if space else None


def write_upload_folder(host: str, out: str | Path, torch_index: str | None = None) -> Path:
    """Writes all that ``host`` (of HEADS) needs into the new folder ``out``.

    Args:
        torch_index: address of a package index with CPU builds of PyTorch, for hosts that would get the CUDA one.

    Raises:
        UserError: ``out`` exists and is not empty.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} 已经有东西了；请换一个新的文件夹名。")
    out.mkdir(parents=True, exist_ok=True)
    for name in CONTENT:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, out / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copyfile(source, out / name)
    _write(out / "README.md", f"---\n{HEADS[host]}---\n\n{BODY}")
    needed = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").partition(TESTS_HEADING)[0]
    index = f"--extra-index-url {torch_index}\n" if torch_index else ""
    _write(out / "requirements.txt", index + needed)
    if host == "studio":
        _write(out / "ms_deploy.json", json.dumps(DEPLOYMENT, indent=2) + "\n")
    return out


def _write(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8", newline="\n")


def main() -> None:
    parser = CommandParser("python -m studytiny.hosting", "把要上传到托管平台的文件放进一个新文件夹。")
    parser.add_argument(
        "host", choices=HEADS, metavar="平台", help="space：Hugging Face Space；studio：ModelScope 创空间"
    )
    parser.add_argument("out", metavar="文件夹", help="写到哪里；要是新的或空的")
    parser.add_argument(
        "--torch-index", metavar="网址", help="有 CPU 版 PyTorch 的软件源；Space 上不写就会装很大的 CUDA 版"
    )
    arguments = parser.parse_args()
    out = write_upload_folder(arguments.host, arguments.out, arguments.torch_index)
    print(f"写好了：{out}。把里面的全部文件上传到一个新建的 {arguments.host} 就行。")


if __name__ == "__main__":
    run_command(main)
