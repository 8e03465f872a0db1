"""The page as visitors meet it: the real app.py in a process of its own, and a real browser."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from studytiny import DialogueModel, Generator, SamplingConfig, Tokenizer, load_model, save_checkpoint
from studytiny.hub import BUNDLED_FOLDER
from studytiny.web.texts import EXAMPLES, TEXTS
from tests.browser import ChatPage, command, offline_environment, running_browser, running_page
from tests.loopback_hub import LoopbackHub
from tests.published_factory import write_published

CHARACTERS = "你好吗我是谁叫什么名字今天有点累喜欢吃谢再见小明，。？！<b>imgscript/&;"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with running_browser() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def generator(folder: Path) -> Generator:
    """An untrained model in place of the bundled one: what it says is nonsense, but always the same."""
    torch.manual_seed(0)
    common = "".join(map(chr, range(0x4E00, 0x4E00 + 300)))
    tokenizer = Tokenizer(dict.fromkeys(CHARACTERS + common))
    model = DialogueModel(tokenizer.vocab_size, d_model=64, n_head=4, n_layers=2, max_length=256)
    save_checkpoint(folder / "bundled", model, tokenizer)
    return Generator(*load_model(folder / "bundled", "cpu"))


@pytest.fixture(scope="module")
def address(browser: Any, folder: Path, generator: Generator) -> Iterator[str]:
    """A page whose model writes slowly, on a machine from which ModelScope is out of reach."""
    arguments = command(folder / "bundled", seconds_per_character=0.01)
    with running_page(arguments, offline_environment(folder), folder) as running:
        yield running


@pytest.fixture
def open_page(browser: Any, address: str) -> Iterator[Callable[..., ChatPage]]:
    """Opens the page; afterwards nothing may stand on its console, and nothing may have been fetched elsewhere."""
    opened: list[ChatPage] = []

    def open_it(**options: Any) -> ChatPage:
        opened.append(ChatPage(browser, address, **options))
        return opened[-1]

    yield open_it
    problems = [problem for page in opened for problem in page.problems]
    for page in opened:
        page.close()
    assert problems == []


def test_three_turns_with_the_bundled_model(browser: Any, folder: Path) -> None:
    if not BUNDLED_FOLDER.is_dir():
        pytest.skip("the bundled model is not there yet")
    with running_page(command(), offline_environment(folder), folder) as address:
        page = ChatPage(browser, address)
        replies = [page.send(said) for said in ("你好", "你是谁？", "谢谢你，再见")]
        assert all(replies)
        assert page.messages("user") == ["你好", "你是谁？", "谢谢你，再见"]
        assert page.messages("bot") == replies
        assert page.problems == []
        page.close()


def test_reply_streams(open_page: Callable[..., ChatPage]) -> None:
    page = open_page()
    page.start("你好")
    seen: set[str] = set()
    end = time.monotonic() + 30
    while len(seen) < 4 and time.monotonic() < end:
        seen.update(text for text in page.messages("bot") if text.strip())
    whole = page.reply()
    assert len(seen) >= 4
    assert all(whole.startswith(text) for text in seen)


def test_stop_keeps_the_text_and_the_chat_goes_on(open_page: Callable[..., ChatPage]) -> None:
    page = open_page()
    page.set("max_new_tokens", 200)
    page.start("你好")
    page.page.wait_for_function("(document.querySelector('#chat [data-testid=bot]')?.innerText || '').length > 3")
    page.page.locator("#message .stop-button").click()
    stopped = page.reply()
    page.page.wait_for_timeout(500)
    assert page.messages("bot") == [stopped]
    assert 3 < len(stopped) < 200
    page.set("max_new_tokens", 5)
    page.press("重试")
    page.page.wait_for_function("(old) => document.querySelector('[data-testid=bot]')?.innerText !== old", arg=stopped)
    retried = page.reply()
    page.send("再见")
    assert page.messages("bot")[0] == retried


def test_retry_undo_and_clear(open_page: Callable[..., ChatPage]) -> None:
    page = open_page()
    page.set("max_new_tokens", 20)
    first = page.send("你好")
    old = page.send("你是谁？")
    page.press("重试")
    page.page.wait_for_function(
        "(old) => [...document.querySelectorAll('[data-testid=bot]')].at(-1)?.innerText !== old", arg=old
    )
    page.reply()
    assert page.messages("user") == ["你好", "你是谁？"]
    assert page.messages("bot")[0] == first

    page.press("撤销")
    page.page.wait_for_function("document.querySelectorAll('[data-testid=user]').length === 1")
    assert page.box.input_value() == "你是谁？"
    assert page.messages("bot") == [first]

    page.press("清空对话")
    page.page.wait_for_function("document.querySelectorAll('#chat [data-testid]').length <= 1")
    assert page.messages("user") == []
    assert page.send("我回来了") != ""


def test_undo_and_clear_end_a_reply_that_is_still_growing(open_page: Callable[..., ChatPage]) -> None:
    page = open_page()
    first = page.send("你好")
    page.start("你是谁？")
    page.page.wait_for_function("document.querySelectorAll('[data-testid=bot]').length === 2")
    page.press("撤销")
    page.page.wait_for_function("document.querySelectorAll('[data-testid=user]').length === 1")
    assert page.box.input_value() == "你是谁？"
    page.box.press("Enter")
    page.page.wait_for_function("document.querySelectorAll('[data-testid=bot]').length === 2")
    assert page.messages("bot")[0] == first
    page.press("清空对话")
    page.page.wait_for_function("document.querySelectorAll('[data-testid=user]').length === 0")
    page.page.wait_for_timeout(500)
    assert page.messages("bot") == []
    assert page.page.locator("#message .submit-button").is_visible()


def test_edit_answers_anew(open_page: Callable[..., ChatPage]) -> None:
    page = open_page()
    page.set("max_new_tokens", 10)
    page.send("你好")
    page.press("编辑")
    page.page.locator("#chat textarea").fill("你是谁？")
    page.press("发送")
    page.page.wait_for_function("document.querySelector('[data-testid=user]')?.innerText === '你是谁？'")
    page.reply()
    assert page.messages("user") == ["你是谁？"]


def test_example_is_answered(open_page: Callable[..., ChatPage]) -> None:
    page = open_page()
    page.box.fill("写了一半")
    page.page.locator("#chat .example").nth(1).click()
    page.reply()
    assert page.messages("user") == [EXAMPLES[1][0]]
    assert page.box.input_value() == "写了一半"


def test_each_setting_changes_the_next_reply(open_page: Callable[..., ChatPage], generator: Generator) -> None:
    page = open_page()
    page.page.locator("#more button").first.click()
    assert page.page.locator("#seed input").input_value() == ""
    settings: dict[str, Any] = {}
    changes = {
        "seed": 7,
        "max_new_tokens": 12,
        "temperature": 1.8,
        "top_k": 3,
        "repetition_penalty": 2,
        "top_p": 0.3,
    }
    replies = []
    for name, value in changes.items():
        page.set(name, value)
        settings[name] = value
        replies.append(page.send("你好"))
        asked = page.conversation()[:-1]
        assert replies[-1] == generator.reply(asked, SamplingConfig(**settings)), name
    page.page.locator("#temperature input[type=range]").fill("0")
    asked = [*page.conversation(), {"role": "user", "content": "再见"}]
    assert page.send("再见") == generator.reply(asked, SamplingConfig(**{**settings, "temperature": 0}))

    page.page.locator("#reset").click()
    page.page.wait_for_function("document.querySelector('#temperature input[type=number]').value === '0.5'")
    assert page.page.locator("#top_k input[type=number]").input_value() == "50"
    assert page.page.locator("#seed input").input_value() == ""


def test_language_follows_the_browser_and_the_switch(open_page: Callable[..., ChatPage]) -> None:
    page = open_page(locale="en-GB")
    page.set("max_new_tokens", 5)
    page.page.get_by_text(TEXTS["temperature_info"][1]).wait_for()
    page.page.get_by_text(TEXTS["caution"][1]).wait_for()
    assert "Hello!" in page.text_of("#chat .examples")
    page.start("  ")
    assert TEXTS["empty_message"][1] in page.notice()
    page.send("你好")

    page.page.locator("#language").get_by_text("中文").click()
    for key in ("tagline", "temperature", "temperature_info", "top_k_info", "settings", "more", "reset", "links"):
        shown = TEXTS[key][0].split("[")[-1].split("]")[0].split("**")[-1].strip()
        page.page.get_by_text(shown).first.wait_for()
    page.page.get_by_text(TEXTS["caution"][0]).wait_for()
    assert page.box.get_attribute("placeholder") == TEXTS["message_hint"][0]
    assert page.messages("user") == ["你好"]
    page.start("  ")
    assert TEXTS["empty_message"][0] in page.notice()

    page.page.reload()  # the choice is remembered, and Gradio's own texts follow it
    page.page.get_by_text(TEXTS["temperature_info"][0]).wait_for()
    page.page.get_by_text(TEXTS["caution"][0]).wait_for()
    assert page.page.locator("#chat .example").first.inner_text() == EXAMPLES[0][0]


def test_ten_thousand_characters_get_one_sentence_and_stay_in_the_box(open_page: Callable[..., ChatPage]) -> None:
    page = open_page()
    page.set("max_new_tokens", 5)
    long = "长" * 10_000
    page.start(long)
    assert "10000" in page.notice()
    assert page.box.input_value() == long
    page.start("好" * 300)  # what the page takes, but this model's window does not
    assert "300" in page.notice()
    assert page.messages("user") == []
    assert page.send("你好") != ""


def test_enter_that_ends_an_input_method_s_word_sends_nothing(open_page: Callable[..., ChatPage]) -> None:
    page = open_page()
    page.set("max_new_tokens", 5)
    page.box.focus()
    keys = page.context.new_cdp_session(page.page)
    enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 229}  # as a browser names it meanwhile
    keys.send("Input.imeSetComposition", {"text": "ni", "selectionStart": 2, "selectionEnd": 2})
    keys.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", **enter})
    keys.send("Input.insertText", {"text": "你"})
    keys.send("Input.dispatchKeyEvent", {"type": "keyUp", **enter})
    page.box.press("Shift+Enter")
    page.page.keyboard.insert_text("好")
    page.page.wait_for_timeout(500)
    assert page.box.input_value() == "你\n好" and page.messages("user") == []
    page.box.press("Enter")
    page.reply()
    assert page.messages("user") == ["你 好"]


def test_markup_is_shown_as_text(open_page: Callable[..., ChatPage]) -> None:
    page = open_page()
    page.set("max_new_tokens", 5)
    said = "<b>你</b><img src=http://127.0.0.1:9/x.png onerror=alert(1)><script>alert(1)</script>"
    said += " **好** $$x$$ &lt; >_< 1 < 2"
    page.send(said)
    assert page.messages("user") == [said]
    assert page.page.locator("#chat .message img, #chat .message script, #chat .message b").count() == 0
    page.send("🙂👨‍👩‍👧\u202e龘 \x07")
    assert page.messages("user") == [said, "🙂👨‍👩‍👧龘"]


def test_xray_shows_a_reply_from_inside_and_lets_it_go_on_otherwise(
    open_page: Callable[..., ChatPage], generator: Generator
) -> None:
    page = open_page()
    page.set("max_new_tokens", 12)
    page.set("temperature", 1.2)
    reply = page.send("你好")
    page.open_tab("tab_xray")
    tokens = page.page.locator("#xray-reply .token")
    page.page.wait_for_function(
        "(n) => document.querySelectorAll('#xray-reply .token').length === n", arg=len(reply) + 1
    )
    assert "".join(tokens.all_inner_texts()[:-1]) == reply
    assert page.page.locator("#xray-temperature input[type=number]").input_value() == "1.2"  # the chat's own settings

    tokens.nth(2).click()
    page.page.get_by_text("第 3 个字").wait_for()
    assert page.page.locator("#place input[type=number]").input_value() == "3"
    here = page.page.locator("#candidates .here th")
    assert here.inner_text() == reply[2]
    raw = page.page.locator("#candidates .here td").first.inner_text()
    page.page.locator("#xray-temperature input[type=range]").fill("0")
    page.page.locator("#verdict").get_by_text("100.0%").wait_for()  # greedy: one is left
    assert page.page.locator("#candidates .here td").first.inner_text() == raw  # the model's own view stays

    page.page.locator("#looked-at .token").first.wait_for()
    read = page.page.locator("#looked-at .token").count()
    colours = "[...document.querySelectorAll('#looked-at .token')].map(token => token.style.backgroundColor).join()"
    before = page.page.evaluate(colours)
    page.page.locator("#layer label").first.click()
    page.page.wait_for_function(f"(before) => {colours} !== before", arg=before)
    assert page.page.locator("#looked-at .token").count() == read == len("你好") + 3 + 2

    page.page.locator("#other input").click()
    page.page.locator("[role=option]").first.click()
    other = page.page.locator("#other input").input_value()[0]
    page.page.locator("#go-on").click()
    page.page.get_by_text(TEXTS["what_if"][0]).wait_for()
    changed = "".join(page.page.locator("#xray-reply .token").all_inner_texts()[:-1])
    assert changed.startswith(reply[:2] + other)
    page.open_tab("tab_chat")
    assert page.messages("bot") == [reply]  # the chat stays as it was


def test_xray_without_a_reply_and_the_tokenizer_view(open_page: Callable[..., ChatPage]) -> None:
    page = open_page(width=390, locale="en-GB")
    page.open_tab("tab_xray", language=1)
    page.page.get_by_text(TEXTS["xray_empty"][1]).wait_for()
    page.page.locator("#tokens button").first.click()
    page.page.locator("#tokens-text textarea, #tokens-text input").first.fill("你好")
    page.page.locator("#token-table").get_by_text("<|user|>").first.wait_for()
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_each_view_leads_to_its_lesson(open_page: Callable[..., ChatPage]) -> None:
    page = open_page()
    page.set("max_new_tokens", 5)
    page.send("你好")
    page.open_tab("tab_xray")
    page.page.locator("#looked-at .token").first.wait_for()
    links = page.page.locator("#xray .lesson-link:visible, #xray-intro ~ .lesson-link:visible")
    titles = links.all_inner_texts()
    assert [title[:5] for title in titles] == ["第 2 课", "第 3 课", "第 5 课", "第 4 课"]
    page.page.get_by_role("button", name=titles[-1]).click()
    page.page.locator("#lesson-text").get_by_text("算错了方向").wait_for()
    assert "python -m lessons.4_looking_back" in page.text_of("#lesson-text")
    page.page.locator("#lesson label").nth(5).click()
    page.page.locator("#lesson-text").get_by_text("草是什么颜色的").first.wait_for()
    assert "optimizer.step()" in page.text_of("#lesson-text")
    page.page.locator("#language").get_by_text("English").click()
    page.page.locator("#lesson").get_by_text("Lesson 6: how it learns").wait_for()


def test_a_training_run_is_watched_stopped_and_chatted_with(
    browser: Any, folder: Path, generator: Generator, tmp_path: Path
) -> None:
    corpus = tmp_path / "我的.conv"
    lines = [f"E\nM 你好，我是{i}号\nM 你好呀，{i}号\nM 再见\nM 再见，下次再聊\n" for i in range(200)]
    corpus.write_text("".join(lines), encoding="utf-8")
    with running_page(command(folder / "bundled"), offline_environment(tmp_path), tmp_path) as address:
        page = ChatPage(browser, address)
        page.page.set_default_timeout(90_000)  # a run takes a while to begin
        page.open_tab("tab_train")
        page.page.locator("#corpus-file input[type=file]").set_input_files(corpus)
        page.page.wait_for_function("document.querySelector('#doctor textarea')?.value.includes('200 段对话')")
        page.page.locator("#train-start").click()
        page.page.locator("#train-status").get_by_text("每秒").wait_for()
        page.page.reload()  # closing the page does not lose it
        page.open_tab("tab_train")
        page.page.locator("#train-status").get_by_text("正在训练").wait_for()
        page.page.locator("#train-stop").click()
        page.page.locator("#train-status").get_by_text("停下了").wait_for()
        page.page.locator("#train-resume").wait_for()
        page.page.locator("#chat-with").click()
        page.page.locator("#status").get_by_text("我训练的").wait_for()
        assert page.send("再见") != ""
        # Gradio's own chart says these two of itself, whatever it draws.
        charts = ("warning: WARN The input spec uses Vega-Lite", "warning: Method not implemented.")
        assert [problem for problem in page.problems if not problem.startswith(charts)] == []
        page.close()


def test_two_sides_answer_the_same_words(open_page: Callable[..., ChatPage], generator: Generator) -> None:
    page = open_page()
    page.open_tab("tab_compare")
    assert page.page.locator("#right-temperature input[type=number]").input_value() == "1.5"
    for side in ("left", "right"):
        page.page.locator(f"#{side}-temperature input[type=number]").fill("0")
        page.page.locator(f"#{side}-temperature input[type=number]").press("Tab")
    page.page.locator("#right-repetition_penalty input[type=number]").fill("2")
    page.page.locator("#right-repetition_penalty input[type=number]").press("Tab")
    box = page.page.locator("#compare-message textarea")
    asked = [{"role": "user", "content": "你好"}]
    wanted = {
        "left": generator.reply(asked, SamplingConfig(temperature=0)),
        "right": generator.reply(asked, SamplingConfig(temperature=0, repetition_penalty=2.0)),
    }
    box.fill("你好")
    box.press("Enter")
    for side, reply in wanted.items():
        page.page.wait_for_function(
            "([side, reply]) => document.querySelector(`#${side}-chat [data-testid=bot]`)?.innerText === reply",
            arg=[side, reply],
        )
    assert box.input_value() == ""
    page.page.locator("#compare-clear").click()
    page.page.wait_for_function("document.querySelectorAll('#left-chat [data-testid=user]').length === 0")


def test_settings_are_kept_in_the_browser(open_page: Callable[..., ChatPage]) -> None:
    page = open_page()
    page.set("temperature", 1.3)
    page.page.wait_for_timeout(500)
    page.page.reload()
    page.page.wait_for_function("document.querySelector('#temperature input[type=number]')?.value === '1.3'")
    page.page.locator("#reset").click()
    page.page.wait_for_function("document.querySelector('#temperature input[type=number]').value === '0.5'")


def test_about_says_what_it_is(open_page: Callable[..., ChatPage]) -> None:
    page = open_page()
    page.open_tab("tab_about")
    page.page.get_by_text("12356").first.wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_and_dark_mode(open_page: Callable[..., ChatPage], scheme: str) -> None:
    page = open_page(width=390, color_scheme=scheme)
    page.set("max_new_tokens", 30)
    page.send("你好")
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 390
    chat, box, slider = (page.page.locator(name).bounding_box() for name in ("#chat", "#message", "#temperature"))
    assert chat["y"] + chat["height"] <= box["y"] and box["y"] + box["height"] <= slider["y"]
    assert box["y"] + box["height"] <= 844  # what is being written is on the first screen
    lightness = page.page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3)")
    assert (max(map(int, lightness)) < 60) == (scheme == "dark")


def test_without_modelscope_the_page_says_why_and_offers_another_try(open_page: Callable[..., ChatPage]) -> None:
    page = open_page()
    page.page.locator("#download summary").wait_for()
    page.page.locator("#download summary").click()
    assert "ModelScope" in page.text_of("#download details p")
    assert "import_published" in page.text_of("#download details p")
    page.page.locator("#again").click()
    page.page.get_by_text(TEXTS["download_connecting"][0]).wait_for()
    page.page.locator("#download summary").wait_for()


def test_study_tiny_model_downloads_and_answers(
    browser: Any, folder: Path, generator: Generator, tmp_path: Path
) -> None:
    published = write_published(tmp_path / "hub", characters="".join(dict.fromkeys(CHARACTERS)), d_model=64)
    files = {path.name: path.read_bytes() for path in (published.checkpoint, published.vocab)}
    with LoopbackHub(files, bytes_per_second=len(files["model_epoch_2.pt"]) / 5) as hub:
        environment = hub.environment(tmp_path / "home")
        with running_page(command(folder / "bundled"), environment, tmp_path) as address:
            page = ChatPage(browser, address)
            page.set("max_new_tokens", 20)
            first = page.send("你好")
            page.page.locator("#download progress").wait_for()
            page.page.get_by_text(TEXTS["download_ready"][0]).wait_for()
            page.page.locator("#model input").click()
            page.page.get_by_role("option", name=TEXTS["model_published"][0]).click()
            page.page.get_by_text(TEXTS["answering"][0].format(model=TEXTS["model_published"][0])).wait_for()
            assert "published" in page.text_of("#model-note")
            assert page.send("你是谁？") != ""
            assert page.messages("bot")[0] == first
            page.page.locator("#language").get_by_text("English").click()
            page.page.get_by_text(TEXTS["answering"][1].format(model=TEXTS["model_published"][1])).wait_for()
            assert page.problems == []
            page.close()
