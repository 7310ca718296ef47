"""The page of `cxr demo`: drop films, see what a model makes of them.

Films are held in memory for as long as it takes to answer, and never written to a disk. The page asks nothing of any
other machine: its policy (Content-Security-Policy) makes the browser refuse.
"""

from __future__ import annotations

import importlib.resources
import socket
from collections.abc import Callable
from functools import lru_cache
from threading import Lock
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cxr.data.decode import ImageError
from cxr.data.dicom import SUFFIXES
from cxr.errors import UserError
from cxr.serving.answers import about, answer, picture
from cxr.serving.choice import Choice
from cxr.serving.predictor import Predictor

LARGEST = 200_000_000  # bytes of one file: a film of 60 million pixels in 16 bits has 120 million
_AT_HAND = 3  # models that are kept loaded
_LOCAL = ("127.0.0.1", "localhost")
_FILES = {
    "/": ("index.html", "text/html"),
    "/demo.css": ("demo.css", "text/css"),
    "/demo.js": ("demo.js", "text/javascript"),
}
_HEADERS = {
    "Cache-Control": "no-store",  # a browser may not keep a film on its disk either
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Models:
    """The models that may be chosen, the default one first, and those that are loaded."""

    def __init__(self, choices: Callable[[], list[Choice]], load: Callable[[str], Predictor]):
        self._choices, self._load = choices, lru_cache(_AT_HAND)(load)
        self._known: dict[str, Choice] = {}
        self._one_at_a_time = Lock()  # or films that are sent together would need the memory of all of them

    def choices(self) -> list[Choice]:
        """Those there are now."""
        found = self._choices()
        self._known = {choice.uri: choice for choice in found}
        return found

    def apply(self, uri: str, use: Callable[[Choice, Predictor], dict[str, Any]]) -> dict[str, Any]:
        """What `use` makes of the model of that URI. Raises `UserError` if it is none of the choices, or damaged."""
        if uri not in self._known:
            raise UserError(f"{uri}: not a model that this page offers; reload the page")
        with self._one_at_a_time:
            return use(self._known[uri], self._load(uri))


def application(models: Models, hosts: tuple[str, ...] = _LOCAL) -> Starlette:
    """The page as an ASGI application that answers requests for these host names only, `*` for any.

    Otherwise another page could ask it in the name of its own host (DNS rebinding).
    """

    async def file(request: Request) -> Response:
        name, kind = _FILES[request.url.path]
        return Response(
            importlib.resources.files("cxr.serving").joinpath("page", name).read_bytes(), 200, _HEADERS, kind
        )

    async def choices(request: Request) -> Response:
        found = await run_in_threadpool(models.choices)
        return JSONResponse([{"uri": each.uri, "name": each.name} for each in found], 200, _HEADERS)

    async def model(request: Request) -> Response:
        return await _answered(models, request, about)

    async def predict(request: Request) -> Response:
        return await _of_film(models, request, answer)

    async def explain(request: Request) -> Response:
        return await _of_film(models, request, picture)

    routes = [Route(path, file) for path in _FILES]
    routes += [Route("/choices", choices), Route("/model", model)]
    routes += [Route("/predict", predict, methods=["POST"]), Route("/explain", explain, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))])


async def _of_film(
    models: Models, request: Request, use: Callable[[Predictor, bytes, bool], dict[str, Any]]
) -> Response:
    """What `use` makes of the film in the body. Only the ending of its name is sent, since names may be patients'."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > LARGEST:
            return _refused(f"more than {LARGEST // 1_000_000} MB", 413)
    named_dicom = request.query_params.get("ending", "").lower() in SUFFIXES
    return await _answered(models, request, lambda _, predictor: use(predictor, bytes(data), named_dicom))


async def _answered(models: Models, request: Request, use: Callable[[Choice, Predictor], dict[str, Any]]) -> Response:
    """What `use` makes of the model that the request names, as JSON; what a person can mend, in words."""
    try:
        found = await run_in_threadpool(models.apply, request.query_params.get("model", ""), use)
    except ImageError as error:
        return _refused(str(error), 422)
    except UserError as error:
        return _refused(str(error), 404)
    return JSONResponse(found, 200, _HEADERS)


def _refused(reason: str, status: int) -> Response:
    return JSONResponse({"error": reason}, status, _HEADERS)


def serve(models: Models, host: str, port: int, say: Callable[[str], object]) -> None:
    """Serve the page until Ctrl-C or SIGTERM; port 0 takes a free one. `say` is told the address.

    Raises `UserError` if the default model cannot be loaded, or the address is not to be had.
    """
    models.apply(models.choices()[0].uri, about)
    with _listening(host, port) as listener:
        hosts = _LOCAL if host in _LOCAL else ("*",)
        say(f"cxr demo: http://{host}:{listener.getsockname()[1]} (Ctrl-C ends it). Not for clinical use")
        if host not in _LOCAL:
            say("note: whoever reaches this machine can use the page; it has no password")
        config = uvicorn.Config(
            application(models, hosts), log_level="warning", access_log=False, lifespan="off", ws="none"
        )
        uvicorn.Server(config).run([listener])


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except OSError as error:
        reason = str(error.strerror or error).split(" (")[0]  # Python repeats the address in parentheses
        raise UserError(f"--host {host} --port {port}: {reason}; use another port, or 0 for a free one") from error
