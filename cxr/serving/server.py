"""A packaged model over HTTP: the protocol of `mlflow models serve` for JSON, within limits that hold before parsing.

MLflow's own server reads a whole request into memory whatever its size, and answers some malformed ones with 500. This
one is an ASGI application that uvicorn runs. Nothing of a request is written to a log, and no answer quotes one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import traceback
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import cxr
from cxr.config import ServeConfig
from cxr.data.decode import ImageError
from cxr.errors import UserError
from cxr.serving.predictor import Predictor
from cxr.serving.request import Limits, RequestError, images_of

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Answer = tuple[int, bytes]
_PACKAGE, _LIMITS, _THREADS = "CXR_SERVE_PACKAGE", "CXR_SERVE_LIMITS", "CXR_SERVE_THREADS"
_AT_ONCE = 4  # largest requests whose bytes may be in memory together; others wait before they are read
_DRAIN = 120  # seconds that requests which have begun may take after SIGTERM
_STUCK = 60  # seconds without a sign of life after which a worker is replaced; decoding may hold the interpreter
_LOG = logging.getLogger("uvicorn.error")


class _GoneError(Exception):
    """The client has closed the connection."""


class Body:
    """The body of a request as it arrives."""

    def __init__(self, receive: Receive):
        self._receive, self.ended = receive, False

    async def part(self) -> bytes:
        """The next part. Raises `_GoneError` if the client has closed the connection."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise _GoneError
        self.ended = not message.get("more_body", False)
        return bytes(message.get("body", b""))

    async def whole(self, limits: Limits) -> bytes:
        """All of it. Raises `RequestError` if it is too large or too slow."""
        parts, size = [], 0
        try:
            async with asyncio.timeout(limits.seconds):
                while not self.ended:
                    parts.append(await self.part())
                    size += len(parts[-1])
                    limits.check_size(size)
        except TimeoutError as error:
            raise RequestError(f"the request took more than {limits.seconds:g} s to arrive") from error
        return b"".join(parts)

    async def discard(self, seconds: float) -> None:
        """Read and throw away what still comes, for that long at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.ended:
                    await self.part()


class Room:
    """Bytes that requests may hold together. They are let in in the order in which they come."""

    def __init__(self, size: int):
        self._free = size
        self._turn, self._changed = asyncio.Lock(), asyncio.Condition()

    @asynccontextmanager
    async def of(self, size: int) -> AsyncIterator[None]:
        """Hold this many bytes for a block, once they are free."""
        async with self._turn, self._changed:
            await self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            async with self._changed:
                self._free += size
                self._changed.notify_all()


class Server:
    """The ASGI application: POST /invocations, and GET /ping, /health and /version.

    `threads` is how many requests are decoded and predicted at once.
    """

    def __init__(self, predictor: Predictor, limits: Limits, threads: int):
        self.predictor, self.limits = predictor, limits
        self._room = Room(_AT_ONCE * limits.size)
        self._pool = ThreadPoolExecutor(threads, "predict")

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request (https://asgi.readthedocs.io/en/latest/specs/www.html)."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            with suppress(_GoneError):
                body = Body(receive)
                await _respond(*await self._answer(scope, body), body, send, self.limits.seconds)

    async def _answer(self, scope: Message, body: Body) -> Answer:
        route = (scope["method"], scope["path"])
        if route in (("GET", "/ping"), ("GET", "/health")):
            return 200, b"\n"
        if route == ("GET", "/version"):
            return 200, cxr.__version__.encode()
        if route != ("POST", "/invocations"):
            return 404, _error("NOT_FOUND", "unknown; POST to /invocations, or GET /ping, /health or /version")
        try:
            return 200, await self._invoked(dict(scope["headers"]), body)
        except RequestError as error:
            return 400, _error("BAD_REQUEST", str(error))
        except _GoneError:
            raise
        except Exception as error:  # a bug: said without the message, which may quote the request
            line = traceback.extract_tb(error.__traceback__)[-1]
            _LOG.error("%s at %s:%s", type(error).__name__, line.filename, line.lineno)
            return 500, _error("INTERNAL_ERROR", "a bug in the server; its log names the line")

    async def _invoked(self, headers: dict[bytes, bytes], body: Body) -> bytes:
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":
            raise RequestError("the content type is not application/json")
        size = int(headers.get(b"content-length", self.limits.size))  # uvicorn refuses what is no number
        self.limits.check_size(size)
        async with self._room.of(size):
            whole = await body.whole(self.limits)
            return await asyncio.get_running_loop().run_in_executor(self._pool, self._predicted, whole)

    def _predicted(self, body: bytes) -> bytes:
        images = []
        for row, image in enumerate(images_of(body, self.limits)):
            try:
                images.append(self.predictor.prepare(image))
            except ImageError as error:
                raise RequestError(f"image {row}: {error}") from error
        table = self.predictor.predict(images)
        return json.dumps({"predictions": table.to_dict(orient="records")}).encode()


def _error(code: str, message: str) -> bytes:
    """In the form of MLflow's errors."""
    return json.dumps({"error_code": code, "message": message}).encode()


async def _respond(status: int, content: bytes, body: Body, send: Send, seconds: float) -> None:
    """Send an answer, and let a refused client finish what it is sending: it would otherwise see a broken connection in
    place of the reason."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content, "more_body": not body.ended})
    if not body.ended:
        await body.discard(seconds)
        await send({"type": "http.response.body", "body": b""})


async def _lifespan(receive: Receive, send: Send) -> None:
    for stage in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{stage}.complete"})


def app() -> Server:
    """The application of a worker, from what `serve` left in the environment."""
    warnings.simplefilter("ignore")  # decoders' warnings may quote an image
    threads = int(os.environ[_THREADS])
    torch.set_num_threads(threads)
    limits = Limits(**json.loads(os.environ[_LIMITS]))
    return Server(Predictor.load(Path(os.environ[_PACKAGE])), limits, threads)


def serve(package: Path, config: ServeConfig, say: Callable[[str], object]) -> None:
    """Serve a packaged model until SIGTERM or Ctrl-C; then answer what has begun, and return.

    Raises `UserError` when the address cannot be used.
    """
    import uvicorn

    threads = max(1, (os.cpu_count() or 1) // config.workers)
    limits = json.dumps(asdict(Limits.of(config)))
    os.environ.update({_PACKAGE: str(package.absolute()), _LIMITS: limits, _THREADS: str(threads)})
    say(f"serving on http://{config.host}:{config.port}/invocations")
    try:
        uvicorn.run(
            "cxr.serving.server:app",
            factory=True,
            host=config.host,
            port=config.port,
            workers=config.workers,
            http="h11",  # it bounds the headers
            ws="none",
            access_log=False,
            log_level="error",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=_DRAIN,
            timeout_worker_healthcheck=_STUCK,
        )
    except SystemExit as error:
        raise UserError(f"--port {config.port}: cannot be used on {config.host}; name another") from error
