"""A ModelScope on 127.0.0.1 that the real client downloads from, and that can fail in every way a network does.

Faults may be set at the start or at any later time::

    with LoopbackHub({"model_epoch_2.pt": data, "vocab.txt": text}, cut_after=100_000) as hub:
        subprocess.run(command, env=hub.environment(tmp_path))
        assert hub.ranges("model_epoch_2.pt") == [None, "bytes=100000-"]
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Request:
    """One request: ``file`` is None where something else than a file was asked for."""

    path: str
    file: str | None
    range: str | None


class LoopbackHub:
    """Serves ``files`` as the repository ``model_id``.

    Attributes that make it fail; all may be changed while it runs:
        listing_status, file_status: an HTTP status instead of the answer.
        listing_body: these bytes instead of the listing.
        silent_listing: takes the request and never answers.
        wrong_sha: lists sha256 sums that are not those of the files.
        cut_after: closes the connection after this many bytes of a file; once, then it is None again.
        silent_after: sends nothing that lies behind this place in a file, and keeps the connection open.
        bytes_per_second: how fast files are sent.
    """

    def __init__(self, files: dict[str, bytes], model_id: str = "fenuolian/StudyTinyModel", **faults: Any) -> None:
        self.files = dict(files)
        self.model_id = model_id
        self.listing_status = self.file_status = 200
        self.listing_body: bytes | None = None
        self.silent_listing = self.wrong_sha = False
        self.cut_after: int | None = None
        self.silent_after: int | None = None
        self.bytes_per_second: float | None = None
        for name, value in faults.items():
            assert hasattr(self, name), name
            setattr(self, name, value)
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> LoopbackHub:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """From here on connections are refused."""
        self.closing.set()
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def ranges(self, file: str) -> list[str | None]:
        """The Range header of every request for ``file``, in order."""
        return [request.range for request in self.requests if request.file == file]

    def settings(self, home: Path) -> dict[str, str]:
        """Environment variables that lead the client here and keep all it writes in ``home``."""
        return {
            "HOME": str(home),
            "USERPROFILE": str(home),
            "MODELSCOPE_CACHE": str(home / "cache"),
            "MODELSCOPE_ENDPOINT": self.endpoint,
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def environment(self, home: Path) -> dict[str, str]:
        """The whole environment for a subprocess: this one's without its own ModelScope settings."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MODELSCOPE_")}
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {**kept, **self.settings(home), "PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: LoopbackHub

    def handle_error(self, *_: object) -> None:
        """A client that was killed is part of the tests, not worth a traceback."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.server.hub
        url = urlsplit(self.path)
        file = parse_qs(url.query).get("FilePath", [None])[0]
        hub.requests.append(Request(url.path, file, self.headers.get("Range")))
        model = f"/api/v1/models/{hub.model_id}/repo"
        if url.path == f"{model}/files":
            self._listing(hub)
        elif url.path == model and file in hub.files and hub.file_status == 200:
            self._file(hub, hub.files[file])
        elif url.path == model:
            self._answer(hub.file_status if file in hub.files else 404, b"{}")
        else:
            self._answer(404, b"{}")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _listing(self, hub: LoopbackHub) -> None:
        if hub.silent_listing:
            self._say_nothing(hub)
            return
        salt = b"another file" if hub.wrong_sha else b""
        entries = [
            {"Path": path, "Name": path.rpartition("/")[2], "Type": "blob", "Size": len(data)}
            | {"Sha256": hashlib.sha256(data + salt).hexdigest()}
            for path, data in hub.files.items()
        ]
        body = json.dumps({"Code": 200, "Success": True, "Data": {"Files": entries}}).encode()
        self._answer(hub.listing_status, body if hub.listing_body is None else hub.listing_body)

    def _file(self, hub: LoopbackHub, data: bytes) -> None:
        start = 0
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()

        end = len(data)
        cut = hub.cut_after is not None and start + hub.cut_after < end
        if cut:
            end, hub.cut_after = start + hub.cut_after, None
        elif hub.silent_after is not None:
            end = min(end, max(start, hub.silent_after))
        for place in range(start, end, 16384):
            self.wfile.write(data[place : min(place + 16384, end)])
            if hub.bytes_per_second and hub.closing.wait(16384 / hub.bytes_per_second):
                return
        if end < len(data):
            if not cut:
                self._say_nothing(hub)
            self.close_connection = True

    def _say_nothing(self, hub: LoopbackHub) -> None:
        """Keeps the connection open until the other side gives up, or the hub closes."""
        self.connection.settimeout(0.1)
        while not hub.closing.is_set():
            with contextlib.suppress(TimeoutError):
                if not self.connection.recv(1):
                    break
        self.close_connection = True
