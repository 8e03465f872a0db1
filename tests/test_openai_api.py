"""The OpenAI protocol, spoken by the real `openai` client to the real server."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import assistant, user

from studytiny import Generator, SamplingConfig, UserError, load_model
from studytiny.safety import HELP
from studytiny.web import openai_api
from studytiny.web.guard import MAX_BODY
from tests.browser import command, offline_environment, running_page, small_bundled

TALK = [user("你好"), assistant("好呀"), user("我叫什么名字")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openai")
    small_bundled(folder)
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with running_page(command(folder / "bundled"), offline_environment(folder), folder) as running:
        yield running


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    from httpx import Client
    from openai import OpenAI

    return OpenAI(base_url=f"{address}v1", api_key="none", max_retries=0, http_client=Client(trust_env=False))


def test_a_reply_is_the_generators_own(client: Any, folder: Path) -> None:
    generator = Generator(*load_model(folder / "bundled", "cpu"))
    sampling = SamplingConfig(temperature=0.9, top_k=10, repetition_penalty=1.2, max_new_tokens=12, seed=5)
    answer = client.chat.completions.create(
        model="bundled", messages=TALK, temperature=0.9, max_tokens=12, seed=5,
        extra_body={"top_k": 10, "repetition_penalty": 1.2},
    )  # fmt: skip
    [choice] = answer.choices
    assert choice.message.role == "assistant" and choice.message.content == generator.reply(TALK, sampling)
    assert choice.finish_reason == ("length" if len(choice.message.content) == 12 else "stop")
    assert answer.model == "bundled" and answer.usage.completion_tokens == len(choice.message.content)
    generator.close()


def test_streamed_pieces_make_the_same_reply(client: Any) -> None:
    asked = {"model": "bundled", "messages": TALK, "seed": 3, "max_completion_tokens": 20}
    whole = client.chat.completions.create(**asked).choices[0]
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == whole.finish_reason
    assert chunks[0].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1


def test_models_are_listed(client: Any) -> None:
    assert "bundled" in [model.id for model in client.models.list()]


def test_system_messages_and_parts_of_text_are_understood(client: Any) -> None:
    plain = client.chat.completions.create(model="bundled", messages=TALK, seed=1, max_tokens=9)
    parts = [{"role": "system", "content": "你是小天"}, *TALK[:-1]]
    parts.append({"role": "user", "content": [{"type": "text", "text": "我叫什么"}, {"type": "text", "text": "名字"}]})
    again = client.chat.completions.create(model="bundled", messages=parts, seed=1, max_tokens=9)
    assert again.choices[0].message.content == plain.choices[0].message.content


def test_who_speaks_of_suicide_gets_the_fixed_answer(client: Any) -> None:
    answer = client.chat.completions.create(model="bundled", messages=[user("我想自杀")])
    assert answer.choices[0].message.content == HELP[0]


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        ({"model": "nobody"}, 404),
        ({"model": None}, 404),
        ({"messages": []}, 400),
        ({"messages": "你好"}, 400),
        ({"messages": [{"role": "root", "content": "你好"}]}, 400),
        ({"messages": [user("")]}, 400),
        ({"messages": [user("长" * 5000)]}, 400),
        ({"temperature": 99}, 400),
        ({"max_tokens": -1}, 400),
        ({"n": 3}, 400),
        ({"seed": "x"}, 400),
    ],
)
def test_a_wrong_request_is_answered_with_a_sentence(client: Any, wrong: dict[str, Any], status: int) -> None:
    from openai import APIStatusError

    with pytest.raises(APIStatusError) as raised:
        client.chat.completions.create(**{"model": "bundled", "messages": TALK, **wrong})
    assert raised.value.status_code == status
    assert "Traceback" not in str(raised.value) and str(Path(__file__).parents[1]) not in str(raised.value)
    assert client.chat.completions.create(model="bundled", messages=TALK, max_tokens=3).choices


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"", 400), (b"{", 400), (b"[1]", 400), (b"\xff\xfe", 400), (b" " * (MAX_BODY + 1), 413)],
)
def test_what_is_no_request_is_refused(address: str, body: bytes, status: int) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with pytest.raises(urllib.error.HTTPError) as raised:
        opener.open(urllib.request.Request(f"{address}v1/chat/completions", data=body), timeout=10)
    assert raised.value.code == status and json.load(raised.value)["error"]["message"]


def data(event: str) -> Any:
    return json.loads(event.removeprefix("data: "))


def test_a_stream_that_turns_rude_ends_and_one_that_breaks_says_so() -> None:
    def redrawn() -> Iterator[str]:
        yield from ("你", "你好", "哎")

    *events, done = openai_api._events({"id": "x"}, redrawn(), 9)
    assert data(events[-1])["choices"][0]["finish_reason"] == "content_filter" and done == "data: [DONE]\n\n"
    assert "".join(data(event)["choices"][0]["delta"].get("content", "") for event in events) == "你好"

    def broken() -> Iterator[str]:
        yield "你"
        raise UserError("模型坏了。")

    events = list(openai_api._events({"id": "x"}, broken(), 9))
    assert data(events[-2])["error"]["message"] == "模型坏了。"


def test_a_client_that_leaves_stops_the_model() -> None:
    closed = SimpleNamespace(value=False)

    def endless() -> Iterator[str]:
        try:
            for count in range(10**9):
                yield "好" * count
        finally:
            closed.value = True

    events = openai_api._events({"id": "x"}, endless(), 10**9)
    next(events), next(events)
    events.close()
    assert closed.value
