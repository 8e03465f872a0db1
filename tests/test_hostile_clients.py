"""Clients that send what no page sends: each gets an answer without a path or a traceback, none brings out an error of
ours, and the next visitor is served.
"""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import app  # noqa: F401 - sets what Gradio reads while it is imported
from tests.browser import command, offline_environment, running_page, small_bundled

ROOT = str(Path(__file__).parent.parent)
API = "/gradio_api"
JSON = {"Content-Type": "application/json"}
DEEP = "[" * 2000 + "]" * 2000


@dataclass(frozen=True)
class Server:
    address: str
    log: Path
    home: Path

    def ask(self, method: str, path: str, body: str | bytes = b"", headers: dict[str, str] | None = None) -> Any:
        """``(status, body)``; a stream that goes on for ever is read for its beginning only."""
        host, _, port = self.address.removeprefix("http://").rstrip("/").partition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=20)
        try:
            body = body.encode("utf-8") if isinstance(body, str) else body
            connection.putrequest(method, path, skip_host=bool(headers and "Host" in headers))
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            endless = answer.getheader("content-type", "").startswith("text/event-stream")
            return answer.status, answer.read(1) if endless else answer.read()
        finally:
            connection.close()

    def event(self, index: int, data: object, session: str) -> list[dict[str, Any]]:
        """What the queue says to a client that runs the page's function ``index`` with ``data``."""
        joined = {"data": data, "fn_index": index, "session_hash": session, "event_data": None, "trigger_id": None}
        status, _ = self.ask("POST", f"{API}/queue/join", json.dumps(joined), JSON)
        if status != 200:
            return []
        host, _, port = self.address.removeprefix("http://").rstrip("/").partition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=20)
        connection.request("GET", f"{API}/queue/data?session_hash={session}")
        said: list[dict[str, Any]] = []
        for line in connection.getresponse():
            if line.startswith(b"data: "):
                said.append(json.loads(line.removeprefix(b"data: ")))
                if said[-1]["msg"] in ("process_completed", "close_stream", "unexpected_error"):
                    break
        connection.close()
        return said

    def errors_of_ours(self) -> list[str]:
        """Where in this project's files the uncaught errors of the log came up, those of what they called included."""
        log = self.log.read_text(encoding="utf-8", errors="replace")
        found = []
        for traceback in log.split("Traceback (most recent call last)")[1:]:
            places = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', traceback)
            own = [place for place in places if place[0].startswith(ROOT) and "site-packages" not in place[0]]
            # Gradio's own errors pass through the guard, which stands around the whole server; its own end there.
            if own and (own[-1] == places[-1] or not own[-1][0].endswith("guard.py")):
                found.append(" ".join(own[-1]))
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("hostile")
    small_bundled(folder)
    with running_page(command(folder / "bundled"), offline_environment(folder), folder) as address:
        yield Server(address, folder / "page.log", folder)


@dataclass(frozen=True)
class Probe:
    method: str
    path: str
    body: str | bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.method} {self.path[:60]} {self.body[:60]!r} {str(self.headers)[:60]}"


def join(**changes: object) -> str:
    return json.dumps({"data": [], "fn_index": 0, "session_hash": "probe", **changes})


def posts(path: str, *bodies: str | bytes) -> list[Probe]:
    return [Probe("POST", path, body, JSON) for body in bodies]


# Gradio itself answers 500 when it is asked for a function that it does not have.
UNKNOWN_FUNCTIONS = [
    *posts(f"{API}/queue/join", join(fn_index=-1), join(fn_index=10**9)),
    *posts(f"{API}/call/nothing", '{"data": []}'),
]

PROBES = [
    *UNKNOWN_FUNCTIONS,
    # files and addresses that are nobody's business
    *[
        Probe("GET", path)
        for path in (
            f"{API}/file=/etc/passwd",
            f"{API}/file=../../../../etc/passwd",
            f"{API}/file=%2e%2e/%2e%2e/etc/passwd",
            f"{API}/file=app.py",
            f"{API}/file=studytiny/web/guard.py",
            f"{API}/file=http://127.0.0.1:9/",
            f"{API}/file=https%3A//a.b/c",
            f"{API}/proxy=http://127.0.0.1:9/",
            f"{API}/proxy=https://evil.example/x",
            "/assets/../../app.py",
            "/static/../../../etc/passwd",
            "/static/%2e%2e/%2e%2e/etc/passwd",
            "/svelte/../../../../etc/passwd",
            "//etc/passwd",
            "/%00",
            "/" + "a" * 6000,
            "/config?x=" + "a" * 3000,
            "/monitoring",
            f"{API}/monitoring",
            f"{API}/monitoring/summary",
            "/.env",
            "/.git/config",
            f"{API}/stream/a/b/c/playlist.m3u8",
            f"{API}/queue/data",
            f"{API}/queue/data?session_hash=",
            f"{API}/call/chat/not-an-event",
            f"{API}/call/nothing/1",
            f"{API}/upload_progress?upload_id=../../x",
            f"{API}/deep_link?session_hash=x",
            f"{API}/nothing",
            "/v1/models/../../etc",
            "/v1/nothing",
        )
    ],
    # methods that nobody uses
    *[
        Probe(method, path)
        for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE")
        for path in ("/", f"{API}/queue/join")
    ],
    # functions that stand behind the queue, called past it
    *posts(f"{API}/run/chat", '{"data": ["你好"]}', "{}", "x"),
    *posts(f"{API}/api/chat", '{"data": ["你好"]}'),
    *posts(f"{API}/run/predict", join(), join(fn_index=3), "null", DEEP),
    # joining the queue with what is no event
    *posts(f"{API}/queue/join", b"", "{", "null", "[]", '"x"', b"\xff\xfe\x00", DEEP),
    *posts(
        f"{API}/queue/join",
        join(fn_index="0"),
        join(fn_index=None),
        join(fn_index=1.5),
        join(data=None),
        join(data="x"),
        join(data={"a": 1}),
        join(session_hash=None),
        join(session_hash=["a"]),
        join(session_hash="../" * 50),
        join(session_hash="s" * 5000),
        join(trigger_id="x", event_data={"index": DEEP[:100]}),
        join(event_id="mine", batched=True),
        '{"data": [NaN, Infinity, -Infinity], "fn_index": 0, "session_hash": "n"}',
        '{"data": [1e999], "fn_index": 0, "session_hash": "n"}',
        '{"data": ["\\ud800\\u0000"], "fn_index": 0, "session_hash": "n"}',
    ),
    *posts(f"{API}/call/chat", "", "{}", '{"data": 5}', '{"data": [[[[]]]]}', '{"data": [' + "1," * 5000 + "1]}"),
    *posts(f"{API}/cancel", "{}", '{"session_hash": "x", "fn_index": 0, "event_id": "y"}', "x"),
    *posts(f"{API}/reset", "{}", '{"event_id": "y"}'),
    *posts(
        f"{API}/component_server", "{}", '{"session_hash": "x", "component_id": 1, "fn_name": "__init__", "data": 1}'
    ),
    *posts("/login", "username=a&password=b"),
    # bodies too large, and lies about their length
    *posts(f"{API}/queue/join", b"x" * 1_000_001),
    *posts("/v1/chat/completions", b"[" * 1_000_001, DEEP, '{"messages": ' + DEEP + "}", "null"),
    Probe("POST", f"{API}/queue/join", b"{}", {**JSON, "Content-Length": "2", "Transfer-Encoding": "identity"}),
    # other sites, strange heads
    Probe("POST", f"{API}/queue/join", join(), {**JSON, "Origin": "https://evil.example"}),
    Probe("GET", "/", headers={"Host": "evil.example"}),
    Probe("GET", "/", headers={"Host": ""}),
    Probe("GET", "/", headers={"Cookie": "a=" + "b" * 4000, "Accept-Language": "zh" * 900}),
    Probe("GET", "/", headers={"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "javascript"}),
    Probe("GET", "/config", headers={"X-Forwarded-Prefix": "/../.."}),
    Probe("POST", f"{API}/upload", b"--x\r\nbroken", {"Content-Type": "multipart/form-data; boundary=x"}),
    Probe("POST", f"{API}/upload", b"x", {"Content-Type": "text/plain"}),
]


def test_there_are_enough_probes() -> None:
    assert len(PROBES) >= 60


def test_a_strange_request_gets_an_answer_that_gives_nothing_away(server: Server) -> None:
    seen: list[tuple[Probe, int]] = []
    for probe in PROBES:
        status, answer = server.ask(probe.method, probe.path, probe.body, probe.headers)
        seen.append((probe, status))
        said = answer.decode("utf-8", "replace")
        assert "Traceback" not in said and "root:x:" not in said, str(probe)
        if "evil.example" not in str(probe.headers):  # the page's own settings name no folder either
            assert ROOT not in said and "site-packages" not in said and str(server.home) not in said, str(probe)
    assert [f"{status} {probe}" for probe, status in seen if status >= 500 and probe not in UNKNOWN_FUNCTIONS] == []
    assert server.errors_of_ours() == []
    assert served(server)


def served(server: Server) -> bool:
    """Whether a visitor gets an answer."""
    asked = {"model": "bundled", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 3}
    status, answer = server.ask("POST", "/v1/chat/completions", json.dumps(asked), JSON)
    return status == 200 and bool(json.loads(answer)["choices"][0]["message"]["content"])


GARBAGE: list[object] = [
    None,
    True,
    10**30,
    "../../etc/passwd",
    "\x00\u202e<img src=x onerror=alert(1)>" * 3,
    "长" * 5000,
    [None, 3, "x"],
    {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
    [{"role": "assistant", "content": None}, {"role": 5}],
    [{"role": "user", "content": [{"type": "file", "file": {"path": "/etc/passwd"}}]}],
]


def test_no_function_of_the_page_fails_on_values_that_no_page_sends(server: Server) -> None:
    functions = json.loads(server.ask("GET", "/config")[1])["dependencies"]
    assert len(functions) > 20
    for number, function in enumerate(functions):
        for turn, value in enumerate(GARBAGE):
            said = server.event(function["id"], [value] * len(function["inputs"]), f"s{number}-{turn}")
            for message in said:
                assert "Traceback" not in str(message) and ROOT not in str(message), (function["id"], value)
    assert server.errors_of_ours() == []
    assert served(server)
