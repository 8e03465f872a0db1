"""OpenAI's chat protocol on the page's own server: ``POST /v1/chat/completions`` and ``GET /v1/models``.

So that programs written for it can talk to these models; see OpenAI's API reference, "Chat Completions". Understood are
``model, messages, temperature, top_p, seed, max_tokens, max_completion_tokens, stream, n=1`` and, as extras,
``top_k`` and ``repetition_penalty``; other fields are left aside. The models know no system role: such messages too.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from functools import partial
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from studytiny.errors import UserError
from studytiny.generator import GeneratorBusy
from studytiny.safety import is_filter_on, safe_stream
from studytiny.sampling import SamplingConfig
from studytiny.tokenizer import Message
from studytiny.web.conversation import flatten
from studytiny.web.models import ModelShelf, UnknownModel

_FIELDS = {  # theirs: ours
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
}


def routes(shelf: ModelShelf) -> list[Route]:
    """The routes to add to the server."""
    return [
        Route("/v1/chat/completions", partial(_complete, shelf), methods=["POST"]),
        Route("/v1/models", partial(_list_models, shelf), methods=["GET"]),
    ]


async def _list_models(shelf: ModelShelf, request: Request) -> Response:
    models = [{"id": name, "object": "model", "created": 0, "owned_by": "studytiny"} for name in shelf.names()]
    return JSONResponse({"object": "list", "data": models})


async def _complete(shelf: ModelShelf, request: Request) -> Response:
    body = await request.body()  # bounded by ``studytiny.web.guard``
    try:
        asked = json.loads(body)
        if not isinstance(asked, dict):
            raise ValueError
    except (ValueError, RecursionError):  # also of text that is no UTF-8, and of lists in lists in lists
        return _refuse(400, '请求应是一个 JSON 对象，例如 {"model": "bundled", "messages": [...]}。')
    caller = request.client.host if request.client else ""
    try:
        # The first use of a model reads it from disk.
        texts, turns, sampling = await run_in_threadpool(_begin, shelf, asked, caller)
    except UnknownModel as error:
        return _refuse(404, str(error))
    except GeneratorBusy as error:
        return _refuse(429, str(error))
    except UserError as error:
        return _refuse(400, str(error))
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked["model"]}
    longest = sampling.max_new_tokens
    if asked.get("stream") is True:
        return StreamingResponse(_events(head, texts, longest), media_type="text/event-stream")
    try:
        said = await run_in_threadpool(_last, texts)
    except UserError as error:
        return _refuse(503, str(error))
    choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": _reason(said, longest)}
    read = sum(len(turn["content"]) for turn in turns)
    usage = {"prompt_tokens": read, "completion_tokens": len(said), "total_tokens": read + len(said)}
    return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})


def _begin(
    shelf: ModelShelf, asked: dict[str, Any], caller: str
) -> tuple[Iterator[str], list[Message], SamplingConfig]:
    if asked.get("n", 1) not in (1, None):
        raise UserError("n 只能是 1：每次请求得到一个回答。")
    generator = shelf.generator(asked.get("model"))
    said = asked.get("messages")
    turns = flatten([turn for turn in said if not _is_system(turn)] if isinstance(said, list) else said)
    sampling = SamplingConfig(**{_FIELDS[name]: asked[name] for name in _FIELDS if asked.get(name) is not None})
    return safe_stream(generator, turns, sampling, caller, is_filter_on("page")), turns, sampling


def _is_system(turn: object) -> bool:
    return isinstance(turn, dict) and turn.get("role") in ("system", "developer")


def _last(texts: Iterator[str]) -> str:
    said = ""
    for said in texts:  # noqa: B007 - each is the whole reply so far
        pass
    return said


def _events(head: dict[str, Any], texts: Iterator[str], longest: int) -> Iterator[str]:
    """Server-sent events: what each step adds. What is sent cannot be taken back, so a reply that is drawn anew because
    it turned rude ends here."""

    def event(delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"

    sent, reason = "", ""
    try:
        yield event({"role": "assistant", "content": ""})
        for said in texts:
            if not said.startswith(sent):
                reason = "content_filter"
                break
            yield event({"content": said[len(sent) :]})
            sent = said
        yield event({}, reason or _reason(sent, longest))
    except UserError as error:
        yield f"data: {json.dumps(_error(str(error)))}\n\n"
    finally:
        texts.close()  # a client that leaves must not cost another character
    yield "data: [DONE]\n\n"


def _reason(said: str, longest: int) -> str:
    return "length" if len(said) >= longest else "stop"


def _error(sentence: str) -> dict[str, Any]:
    return {"error": {"message": sentence, "type": "invalid_request_error", "param": None, "code": None}}


def _refuse(status: int, sentence: str) -> Response:
    return JSONResponse(_error(sentence), status_code=status)
