"""The Lessons tab: the files of ``lessons/`` to read in the page, and the buttons elsewhere that lead to one."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from studytiny.web.chat_tab import AT_ONCE
from studytiny.web.language import Texts
from studytiny.web.texts import DEFAULT_LANGUAGE, text

FOLDER = Path(__file__).resolve().parents[2] / "lessons"


@dataclass(frozen=True)
class Lesson:
    """A lesson's file.

    Attributes:
        name: of its module, which begins with its number.
        titles: Chinese and English.
        text: what it teaches, Markdown.
        code: the program below it.
    """

    name: str
    titles: tuple[str, str]
    text: str
    code: str

    def title(self, language: str) -> str:
        """The heading."""
        return self.titles[language != "zh"]


def read_lessons(folder: Path = FOLDER) -> list[Lesson]:
    """All lessons in their order: a module docstring with a heading, its English in italics, and the text; then code.

    A copy of the project without lessons has none.
    """
    return [_read(path) for path in sorted(folder.glob("[0-9]*.py"), key=lambda path: int(path.stem.split("_")[0]))]


def _read(path: Path) -> Lesson:
    source = path.read_text(encoding="utf-8")
    docstring = ast.parse(source).body[0]
    heading, english, body = ast.literal_eval(docstring.value).split("\n\n", 2)
    titles = (heading.removeprefix("# "), english.strip("*"))
    code = "".join(source.splitlines(keepends=True)[docstring.end_lineno :])
    # Markdown makes a space of a line break, which Chinese has no use for.
    body = re.sub(r"(?<=[\u3000-\uffef])\n(?=[\u3000-\uffef])", "", body.strip())
    return Lesson(path.stem, titles, body, code.strip() + "\n")


class Lessons:
    """What the tabs share: ``link`` makes a button that leads to a lesson, ``build`` the tab that they lead to."""

    def __init__(self, lessons: list[Lesson] | None = None) -> None:
        self.lessons = read_lessons() if lessons is None else lessons
        self._links: list[tuple[gr.Button, int]] = []

    def link(self, number: int) -> None:
        """A button with the title of lesson ``number``, from 1 on; none if there is no such lesson."""
        if number <= len(self.lessons):
            title = self.lessons[number - 1].title(DEFAULT_LANGUAGE)
            self._links.append((gr.Button(title, size="sm", elem_classes="lesson-link"), number - 1))

    def build(self, texts: Texts, language: gr.Radio) -> None:
        """The tab, inside the current Blocks."""
        texts.component(gr.Markdown, {"value": "lessons_intro"}, elem_id="lessons-intro")
        self.chosen = texts.component(
            gr.Radio,
            {"label": "lesson"},
            choices=self._choices(DEFAULT_LANGUAGE),
            value=0,
            show_label=False,
            container=False,
            elem_id="lesson",
        )
        self.text = gr.Markdown(_whole(self.lessons[0], DEFAULT_LANGUAGE), elem_id="lesson-text")
        self.chosen.input(self.show, [language, self.chosen], self.text, **AT_ONCE)

    def connect(self, tabs: gr.Tabs, language: gr.Radio) -> None:
        """Makes the buttons lead here."""
        for button, index in self._links:
            opening = partial(self.open, index=index)
            button.click(opening, language, [tabs, self.chosen, self.text], **AT_ONCE)

    def open(self, language: str, index: int) -> list[Any]:
        """The tab with one lesson."""
        return [gr.Tabs(selected="lessons"), index, self.show(language, index)]

    def show(self, language: str, index: object) -> Any:
        """One lesson; what is no lesson's index, a client may send anything, changes nothing."""
        if type(index) is not int or not 0 <= index < len(self.lessons):
            return gr.skip()
        return _whole(self.lessons[index], language)

    def _choices(self, language: str) -> list[tuple[str, int]]:
        return [(lesson.title(language), index) for index, lesson in enumerate(self.lessons)]

    # the page's language

    @property
    def localized(self) -> list[gr.blocks.Block]:
        """The components that ``localize`` updates."""
        return [self.chosen, *(button for button, _ in self._links)]

    def localize(self, language: str) -> list[Any]:
        """Titles in ``language``; the lessons themselves are Chinese."""
        titles = [self.lessons[index].title(language) for _, index in self._links]
        return [gr.update(choices=self._choices(language)), *titles]


def _whole(lesson: Lesson, language: str) -> str:
    """A lesson as Markdown: its text, how to run it, and the program."""
    command = f"python -m lessons.{lesson.name}"
    run = text("lesson_run", language)
    return f"{lesson.text}\n\n{run}\n\n```bash\n{command}\n```\n\n```python\n{lesson.code}```\n"
