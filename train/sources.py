"""The corpora that training and evaluation know by name, and files."""

from __future__ import annotations

from pathlib import Path

from studytiny.errors import UserError
from train import demo
from train.corpus import ConvDataset

DEMO = "demo"
DEMO_DIALOGUES = 40_000


def load_corpus(name: str) -> ConvDataset:
    """The corpus called ``name``: ``demo``, or the path of a ``.conv`` file.

    Raises:
        UserError: it is neither, or holds nothing to learn.
    """
    if name == DEMO:
        return ConvDataset.from_dialogues(demo.generate(DEMO_DIALOGUES), DEMO)
    if not Path(name).exists():
        raise UserError(f"找不到语料 {name}：它不是文件，也不是自带语料的名字（{DEMO}）；请检查 --corpus 后面的路径。")
    return ConvDataset(name).process_file()
