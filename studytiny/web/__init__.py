"""The page: builds it and serves it. One file a tab; app.py is its entry."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from studytiny.errors import UserError
from studytiny.hosting import is_hosted
from studytiny.sampling import SamplingConfig
from studytiny.web import openai_api, train_tab
from studytiny.web.about_tab import build_about
from studytiny.web.chat_tab import ChatTab, restored_settings
from studytiny.web.compare_tab import CompareTab
from studytiny.web.guard import Guard
from studytiny.web.language import Texts
from studytiny.web.lessons_tab import Lessons
from studytiny.web.models import BUNDLED, ModelShelf
from studytiny.web.older_gradio import supported
from studytiny.web.texts import DEFAULT_LANGUAGE, LANGUAGES, translations
from studytiny.web.train_tab import TrainTab
from studytiny.web.xray_tab import XrayTab

__all__ = ["build_page", "serve"]

_CSS = Path(__file__).with_name("style.css")
_HEAD = Path(__file__).with_name("head.html")
_QUEUE_SIZE = 256  # events that wait; the line that visitors stand in is the generator's, which speaks their language
_MAX_THREADS = 128  # each reply being written or waited for holds one, asleep most of the time
# Fonts that are on the visitor's machine already: nothing is fetched, and Chinese looks at home on each system.
_FONTS = ("system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "Noto Sans SC", "sans-serif")
_MONO_FONTS = ("ui-monospace", "Consolas", "Menlo", "Noto Sans Mono CJK SC", "monospace")


def build_page(shelf: ModelShelf | None = None) -> gr.Blocks:
    """The whole page; nothing is loaded or fetched before it is served."""
    shelf = shelf or ModelShelf()
    texts, lessons = Texts(), Lessons()
    with gr.Blocks(title="StudyTiny", analytics_enabled=False, fill_width=True) as page:
        with gr.Row(elem_id="header"):
            gr.Markdown("# StudyTiny", elem_id="heading")
            language = texts.component(
                gr.Radio,
                {"label": "language"},
                choices=[(name, code) for code, name in LANGUAGES.items()],
                value=DEFAULT_LANGUAGE,
                show_label=False,
                container=False,
                min_width=150,
                elem_id="language",
            )
        texts.component(gr.Markdown, {"value": "tagline"}, elem_id="tagline")
        with gr.Tabs(elem_id="tabs") as tabs:
            with texts.component(gr.Tab, {"label": "tab_chat"}, id="chat"):
                chat = ChatTab(shelf, texts, language)
            with texts.component(gr.Tab, {"label": "tab_xray"}, id="xray") as xray_tab:
                xray = XrayTab(shelf, texts, language, chat, lessons)
            with texts.component(gr.Tab, {"label": "tab_compare"}, id="compare") as compare_tab:
                compare = CompareTab(shelf, texts, language)
            train = None
            if train_tab.is_offered():
                with texts.component(gr.Tab, {"label": "tab_train"}, id="train") as own_tab:
                    train = TrainTab(shelf, texts, language, chat, lessons)
            if lessons.lessons:
                with texts.component(gr.Tab, {"label": "tab_lessons"}, id="lessons"):
                    lessons.build(texts, language)
            with texts.component(gr.Tab, {"label": "tab_about"}, id="about"):
                build_about(texts)
        xray.connect_opening(xray_tab)
        compare.connect_opening(compare_tab)
        others: list[Any] = [xray]  # tabs with something to translate that is no plain text of texts.py
        if lessons.lessons:
            lessons.connect(tabs, language)
            others.append(lessons)
        if train:
            train.connect_tabs(tabs, own_tab)
            others.append(train)
        texts.component(gr.Markdown, {"value": "links"}, elem_id="links")

        def localize(chosen: str, model: str) -> list[Any]:
            more = [update for other in others for update in other.localize(chosen)]
            return [*texts.updates(chosen), *chat.localize(chosen, model), *more]

        def greet(browser: str) -> str:
            shelf.start_download()
            return browser

        more = [component for other in others for component in other.localized]
        everything = [*texts.components, *chat.localized, *more]
        options = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        # The page asks the browser, not the Accept-Language header, so that it agrees with Gradio's own texts.
        page.load(greet, language, language, js=_READ_LANGUAGE, **options).then(
            localize, [language, chat.model], everything, **options
        )
        page.load(restored_settings, chat.kept, chat.settings, **options)
        language.input(localize, [language, chat.model], everything, js=_KEEP_LANGUAGE, **options)
    page.queue(max_size=_QUEUE_SIZE, api_open=False)
    page.shelf = shelf
    return page


# A choice is kept in the browser; head.html then tells Gradio's own texts about it.
_READ_LANGUAGE = "() => [navigator.language.toLowerCase().startsWith('zh') ? 'zh' : 'en']"
_KEEP_LANGUAGE = (
    "(language, model) => { localStorage.setItem('studytiny-language', language); return [language, model]; }"
)


def page_theme() -> gr.themes.Base:
    """Calm colours, plain headings over the controls, and fonts of the visitor's own system."""
    theme = gr.themes.Soft(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        radius_size="lg",
        font=_FONTS,
        font_mono=_MONO_FONTS,
    )
    return theme.set(
        # Cards with a fine border on a tinted page
        body_background_fill="*neutral_100",
        background_fill_primary="white",
        background_fill_primary_dark="*neutral_950",
        block_border_width="1px",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_800",
        block_shadow="none",
        input_border_color="*neutral_200",
        input_border_color_dark="*neutral_700",
        input_shadow="none",
        button_border_width="1px",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_600",
        button_secondary_shadow="none",
        # Names and explanations of the controls: plain, and with enough contrast to read
        block_title_background_fill="none",
        block_title_background_fill_dark="none",
        block_title_padding="0",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_100",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        # What is read in colour or on it: contrast of 4.5 at least (WCAG 2.1, level AA)
        link_text_color="*primary_700",
        link_text_color_visited="*primary_700",
        link_text_color_dark="*primary_300",
        link_text_color_visited_dark="*primary_300",
        block_label_background_fill="*neutral_100",
        block_label_background_fill_dark="*neutral_800",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        checkbox_label_background_fill_selected="*primary_700",
        checkbox_label_background_fill_selected_dark="*primary_700",
        checkbox_label_shadow="none",
        slider_color="*primary_600",
    )


def launch_options(shelf: ModelShelf) -> dict[str, Any]:
    """What ``launch`` is told."""
    wanted = {
        "app_kwargs": {
            "routes": openai_api.routes(shelf),
            "middleware": [Middleware(Guard, uploads=train_tab.is_offered(), local=_is_local())],
        },
        "theme": page_theme(),
        "css": _CSS.read_text(encoding="utf-8"),
        "head": _HEAD.read_text(encoding="utf-8"),
        "i18n": gr.I18n(**translations()),
        "footer_links": ["api", "settings"],
        "run_history": False,
        "enable_monitoring": False,
        "ssr_mode": False,
        "pwa": False,
        "mcp_server": False,
        "max_threads": _MAX_THREADS,
        "max_file_size": train_tab.LARGEST_CORPUS if train_tab.is_offered() else "1mb",
        "show_error": False,
        "quiet": True,
        "prevent_thread_lock": True,
    }
    return supported(gr.Blocks.launch, wanted)


def _is_local() -> bool:
    """Whether the page is served to this computer only."""
    return not is_hosted() and os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1") in ("127.0.0.1", "localhost")


def serve(page: gr.Blocks) -> None:
    """Serves the page until Ctrl-C. Host and port come from Gradio's own environment variables.

    Raises:
        UserError: the port is taken, and so are those after it that Gradio tries.
    """
    try:
        _, url, _ = page.launch(**launch_options(page.shelf))
    except OSError as error:
        port = os.environ.get("GRADIO_SERVER_PORT", "7860")
        raise UserError(
            f"打不开端口 {port}，它后面的端口也不行（可能都被占用了）；请用环境变量 GRADIO_SERVER_PORT 换一个端口。"
        ) from error
    with contextlib.suppress(KeyboardInterrupt):
        print(f"StudyTiny 已经打开：{url}  （按 Ctrl-C 退出）", flush=True)
        # From now on at once and not by an exception: Python drops one that comes up in a finalizer.
        signal.signal(signal.SIGINT, _leave)
        _warm_up(page.shelf)
        while True:
            time.sleep(3600)  # unlike waiting for an event, Ctrl-C ends it on Windows too
    _leave()


def _leave(*_: object) -> None:
    print("\n再见。", flush=True)
    # Replies and the download may be busy in other threads; Python would wait for some and crash others.
    os._exit(0)


def _warm_up(shelf: ModelShelf) -> None:
    """Loads the bundled model and lets it say one thing, so that the first visitor need not wait for either."""
    with contextlib.suppress(UserError):  # then the page says so when somebody writes to it
        shelf.generator(BUNDLED).reply([{"role": "user", "content": "你好"}], SamplingConfig(max_new_tokens=1))
