"""What stands before the server: what is too large, from elsewhere or of no use to anybody gets no further."""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router
from starlette.testclient import TestClient

import app  # noqa: F401 - sets what Gradio reads while it is imported
from studytiny.web.guard import HEADERS, MAX_BODY, Guard, _is_this_computer
from tests.browser import command, offline_environment, running_page, small_bundled


def client(uploads: bool = False, local: bool = True) -> TestClient:
    async def echo(request: Request) -> Response:
        return PlainTextResponse(str(len(await request.body())))

    inner = Router(routes=[Route("/{path:path}", echo, methods=["GET", "POST"])])
    return TestClient(Guard(inner, uploads, local), base_url="http://127.0.0.1:7860")


def test_bodies_are_bounded_whatever_the_client_says_of_their_length() -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(12):
            yield b"x" * 100_000

    guarded = client()
    assert guarded.post("/a", content=b"x" * MAX_BODY).text == str(MAX_BODY)
    assert guarded.post("/a", content=b"x" * (MAX_BODY + 1)).status_code == 413
    assert guarded.post("/a", content=pieces()).status_code == 413
    assert guarded.post("/a", headers={"content-length": "many"}, content=b"x").status_code == 413


def test_uploads_only_where_something_may_be_uploaded() -> None:
    large = b"x" * (MAX_BODY + 1)
    assert client().post("/gradio_api/upload", content=b"x").status_code == 404
    assert client(uploads=True).post("/gradio_api/upload?upload_id=1", content=large).text == str(len(large))


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/file=http://127.0.0.1:9/x", "/gradio_api/file=HTTPS%3A//a.b/c", "/gradio_api/proxy=http://a.b"],
)
def test_nothing_is_fetched_for_a_client(path: str) -> None:
    assert client().get(path).status_code == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://127.0.0.1:7860"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "evil.example"}, 403),
        ({"host": ""}, 403),
    ],
)
def test_at_home_other_sites_get_no_answer(headers: dict[str, str], status: int) -> None:
    assert client().post("/a", headers=headers, content=b"x").status_code == status
    assert client(local=False).post("/a", headers=headers, content=b"x").status_code == 200


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost:7860", True),
        ("127.0.0.1", True),
        ("[::1]:7860", True),
        ("192.168.1.5:7860", True),
        ("mypc:7860", True),
        ("mypc.local", True),
        ("evil.example:7860", False),
        ("127.0.0.1.evil.example", False),
        ("", False),
    ],
)
def test_names_of_this_computer(host: str, local: bool) -> None:
    assert _is_this_computer(host) is local


def test_answers_say_what_a_browser_may_do() -> None:
    headers = client().get("/").headers
    assert all(headers[name] == value for name, value in HEADERS.items())


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    folder = tmp_path_factory.mktemp("guard")
    small_bundled(folder)
    environment = {**offline_environment(folder), "STUDYTINY_TRAIN": "0"}
    with running_page(command(folder / "bundled"), environment, folder) as running:
        host, _, port = running.removeprefix("http://").rstrip("/").partition(":")
        yield host, int(port)


def ask(address: tuple[str, int], method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, float]:
    connection = http.client.HTTPConnection(*address, timeout=20)
    begun = time.monotonic()
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        return connection.getresponse().status, time.monotonic() - begun
    finally:
        connection.close()


def test_the_real_server_is_guarded_and_goes_on(address: tuple[str, int], tmp_path: Path) -> None:
    large = b'{"data": ["' + b"x" * 1_200_000 + b'"]}'
    status, seconds = ask(address, "POST", "/gradio_api/queue/join", large, content_type="application/json")
    assert status == 413 and seconds < 1
    assert ask(address, "POST", "/gradio_api/upload", b"x", content_type="text/plain")[0] == 404
    assert ask(address, "GET", "/gradio_api/file=http://127.0.0.1:9/x")[0] == 404
    assert ask(address, "GET", "/gradio_api/file=/etc/passwd")[0] >= 400
    assert ask(address, "GET", "/", host="evil.example")[0] == 403
    join = b'{"data": [], "fn_index": 0, "session_hash": "a"}'
    evil = {"content_type": "application/json", "origin": "https://evil.example"}
    assert ask(address, "POST", "/gradio_api/queue/join", join, **evil)[0] == 403
    assert ask(address, "GET", "/")[0] == 200
