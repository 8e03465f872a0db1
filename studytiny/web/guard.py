"""What stands before Gradio's server: requests that nobody needs, or that are too large, get no further.

Gradio by itself takes bodies of any size, fetches public addresses that a client names, takes files where none are
wanted, and answers pages of other sites in a visitor's browser.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import unquote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 1_000_000  # bytes of anything but an uploaded file
DRAINED = 32_000_000  # bytes read of a request that is refused
UPLOADS = "/gradio_api/upload"
FETCHING = ("/gradio_api/file=http", "/gradio_api/proxy=")
SENTENCES = {
    403: "这个网页只给这台电脑用，请用 http://127.0.0.1 打开；要给别的电脑用，请设环境变量 "
    "GRADIO_SERVER_NAME=0.0.0.0 再启动。",
    404: "没有这个地址；请从网页的首页进入。",
    413: f"请求太大：最多 {MAX_BODY} 字节；请缩短或分几次发。",
}
HEADERS = {
    "Content-Security-Policy": "img-src 'self' data: blob:; object-src 'none'; base-uri 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Guard:
    """Middleware of the ASGI kind.

    Args:
        uploads: files may be uploaded, as the Train tab needs it; Gradio bounds their size itself.
        local: the page is for this computer. Then it answers to names of this computer only, and not to other sites: a
            page somewhere could otherwise make a visitor's browser use this one.
    """

    def __init__(self, app: ASGIApp, uploads: bool, local: bool) -> None:
        self._app = app
        self._uploads = uploads
        self._local = local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = self._refusal(scope["path"], scope["method"], Headers(scope=scope))
        if status:
            await _refuse(status, scope, receive, send)
            return
        bounded = _Bounded(receive, None if scope["path"].startswith(UPLOADS) else MAX_BODY)
        try:
            await self._app(scope, bounded, _with_headers(send, bounded))
        except _TooLarge:
            if not bounded.answering:
                await _refuse(413, scope, receive, send, bounded.more)

    def _refusal(self, path: str, method: str, headers: Headers) -> int:
        """A status to answer with at once; 0 to go on."""
        plain = unquote(path).lower()
        if plain.startswith(FETCHING):
            return 404
        uploading = plain.startswith(UPLOADS)
        if uploading and not self._uploads:
            return 404
        length = headers.get("content-length", "0")
        if not uploading and (not length.isdecimal() or int(length) > MAX_BODY):
            return 413
        if self._local:
            host = headers.get("host", "")
            if not _is_this_computer(host):
                return 403
            origin = headers.get("origin")
            if origin is not None and method != "GET" and urlsplit(origin).netloc != host:
                return 403
        return 0


def _is_this_computer(host: str) -> bool:
    """Whether ``host`` of a request is an address or a local name, which no stranger's name server can point here."""
    name = urlsplit(f"//{host}").hostname or ""
    if name == "localhost" or name.endswith((".localhost", ".local")) or "." not in name.strip("."):
        return bool(name)
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _refuse(status: int, scope: Scope, receive: Receive, send: Send, more: bool = True) -> None:
    """Answers with a sentence. A client that is still sending would see a broken connection instead of it, so what it
    sends is read first and thrown away, within limits."""
    read = 0
    while more and read < DRAINED:
        message = await receive()
        read += len(message.get("body", b""))
        more = message["type"] == "http.request" and message.get("more_body", False)
    await JSONResponse({"error": {"message": SENTENCES[status]}}, status)(scope, receive, send)


class _TooLarge(Exception):
    pass


class _Bounded:
    """``receive`` that counts the body's bytes: a client need not say beforehand how much comes."""

    def __init__(self, receive: Receive, most: int | None) -> None:
        self._receive = receive
        self._most = most
        self._read = 0
        self.answering = False
        self.more = True  # of the body is to come

    async def __call__(self) -> Message:
        message = await self._receive()
        self._read += len(message.get("body", b""))
        self.more = message.get("more_body", False)
        if self._most is not None and self._read > self._most and not self.answering:
            raise _TooLarge
        return message


def _with_headers(send: Send, bounded: _Bounded) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            bounded.answering = True
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sending
