"""Requests to the server: what is answered, what is refused, and when."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from narrow import narrow_resnet
from PIL import Image

from cxr.config import ServeConfig
from cxr.errors import UserError
from cxr.serving.predictor import ModelCard, Predictor
from cxr.serving.request import Limits, RequestError, images_of
from cxr.serving.server import Message, Room, Server
from cxr.task import KAGGLE

LIMITS = Limits(size=100_000, images=3, pixels=20_000, seconds=5)
JSON = b"application/json"


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    card = ModelCard("resnet18", 32, "squash", 0.5, "frozen", "0" * 12, "random", KAGGLE.class_to_index)
    return Predictor(narrow_resnet().eval(), card)


def picture(side: int = 40, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def text(image: bytes) -> str:
    return base64.b64encode(image).decode()


def request(*images: object) -> bytes:
    return json.dumps({"instances": images}).encode()


class Client:
    """One request to an application, its body in parts; `pause` is the time in seconds before each."""

    def __init__(self, *parts: bytes, kind: bytes | None = JSON, length: int | None = None, pause: float = 0):
        self.parts, self.pause = list(parts), pause
        self.headers = [(b"content-type", kind)] if kind else []
        if length is not None:
            self.headers.append((b"content-length", str(length).encode()))
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        await asyncio.sleep(self.pause)
        if not self.parts:
            return {"type": "http.disconnect"}
        part = self.parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(self.parts)}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def ask(self, app: Server, method: str = "POST", path: str = "/invocations") -> tuple[int, Any]:
        scope = {"type": "http", "method": method, "path": path, "headers": self.headers}
        await app(scope, self.receive, self.send)
        body = b"".join(message.get("body", b"") for message in self.sent)
        return (self.sent[0]["status"], json.loads(body.strip() or b"null")) if self.sent else (0, None)


def answer(predictor: Predictor, *parts: bytes, limits: Limits = LIMITS, **options: Any) -> tuple[int, Any]:
    async def ask() -> tuple[int, Any]:
        return await Client(*parts, **options).ask(Server(predictor, limits, 1))

    return asyncio.run(ask())


def forms(images: Sequence[str]) -> list[dict[str, Any]]:
    """A request in every form of MLflow's protocol."""
    return [
        {"dataframe_split": {"columns": ["image"], "data": [[image] for image in images]}},
        {"dataframe_records": [{"image": image} for image in images]},
        {"instances": list(images)},
        {"instances": [{"image": image} for image in images]},
        {"inputs": list(images)},
        {"inputs": {"image": list(images)}, "params": {}},
    ]


def test_every_form_gets_the_answer_of_the_model(predictor: Predictor) -> None:
    images = [picture(seed=seed) for seed in (0, 1)]
    expected = predictor.predict([predictor.prepare(image) for image in images]).to_dict(orient="records")
    for form in forms([text(image) for image in images]):
        body = json.dumps(form).encode()
        assert answer(predictor, body[:50], body[50:]) == (200, {"predictions": expected})


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"{" * 90, "not JSON"),
        (b"[" * 90, "not JSON"),
        (b"[" * 50_000, "not a list of them as base64"),
        (b"7" * 5000, "not JSON"),
        (b"null", "not a JSON object"),
        (b"{}", "exactly one of"),
        (b'{"instances": ["QQ=="], "inputs": ["QQ=="]}', "exactly one of"),
        (b'{"instances": {}}', "not a list"),
        (b'{"inputs": {"a": [], "b": []}}', "not a list"),
        (b'{"dataframe_split": [1]}', "not a list"),
        (b'{"dataframe_split": {"data": [["QQ==", "QQ=="]]}}', "more than one column"),
        (b'{"instances": []}', "no image"),
        (request("/etc/hostname"), "paths and addresses are not read"),
        (request("http://127.0.0.1/x.png"), "paths and addresses are not read"),
        (request("\ud800"), "image 0: not base64"),
        (request(text(picture()), 7), "image 1: not base64"),
        (request(text(b"no image")), "image 0: not a JPEG, PNG or DICOM file"),
        (request(text(picture()[:-40])), "image 0: "),
        (request(*[text(picture())] * 4), "4 images, more than 3"),
        (request(text(picture(120)), text(picture(120))), "more than 20,000 pixels"),
        (b" " * 100_001, "more than 100,000 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_request_gets_400_and_its_reason(predictor: Predictor, body: bytes, reason: str) -> None:
    status, content = answer(predictor, body)
    assert status == 400
    assert content["error_code"] == "BAD_REQUEST"
    assert reason in content["message"]
    assert "/etc" not in content["message"]


@pytest.mark.parametrize("kind", [None, b"text/csv", b"application/vnd.apache.parquet"])
def test_other_content_types_are_refused(predictor: Predictor, kind: bytes | None) -> None:
    status, content = answer(predictor, request(text(picture())), kind=kind)
    assert (status, content["message"]) == (400, "the content type is not application/json")


def test_a_large_request_is_refused_before_it_is_read(predictor: Predictor) -> None:
    client = Client(b"x", b"y", length=10**12, pause=0.01)

    async def ask() -> tuple[int, Any]:
        return await client.ask(Server(predictor, LIMITS, 1))

    assert asyncio.run(ask())[0] == 400
    first = client.sent[:2]
    assert first[1]["more_body"]  # the answer is whole; what still came was thrown away before the connection ended
    assert client.parts == []


def test_a_request_that_does_not_arrive_is_refused(predictor: Predictor) -> None:
    limits = replace(LIMITS, seconds=0.05)
    status, content = answer(predictor, b"{", b"}", pause=0.2, limits=limits)
    assert (status, content["message"]) == (400, "the request took more than 0.05 s to arrive")


def test_a_dropped_connection_is_not_answered(predictor: Predictor) -> None:
    assert answer(predictor) == (0, None)


def test_health_and_unknown_addresses(predictor: Predictor) -> None:
    async def status(method: str, path: str) -> int:
        return (await Client(b"").ask(Server(predictor, LIMITS, 1), method, path))[0]

    assert asyncio.run(status("GET", "/ping")) == 200
    assert asyncio.run(status("GET", "/health")) == 200
    assert asyncio.run(status("GET", "/../etc/hostname")) == 404
    assert asyncio.run(status("GET", "/invocations")) == 404


def test_a_bug_is_answered_and_logged_without_the_request(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("Planted^Penelope")

    monkeypatch.setattr(Predictor, "predict", fail)
    # Older versions of MLflow turn loggers off that were there before a store was made; a server keeps to its own.
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "disabled", False)
    monkeypatch.setattr(logging.getLogger("uvicorn"), "propagate", True)
    status, content = answer(predictor, request(text(picture())))
    assert status == 500
    assert "RuntimeError at " in caplog.text
    assert "Penelope" not in f"{content} {caplog.text}"


def test_the_room_for_requests_is_given_in_order() -> None:
    order: list[int] = []

    async def hold(room: Room, number: int, size: int) -> None:
        async with room.of(size):
            order.append(number)
            await asyncio.sleep(0.01)

    async def crowd() -> None:
        room = Room(10)
        await asyncio.gather(hold(room, 0, 6), hold(room, 1, 10), hold(room, 2, 1))

    asyncio.run(crowd())
    assert order == [0, 1, 2]  # the small one does not slip past the large one, which would wait for ever


@given(st.binary(max_size=200) | st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists).map(str))
def test_whatever_a_body_holds_is_an_image_or_refused(body: bytes | str) -> None:
    raw = body if isinstance(body, bytes) else body.encode(errors="replace")
    for whole in (raw, b'{"instances": [' + raw + b"]}"):
        with suppress(RequestError):
            assert images_of(whole, LIMITS)


def test_limits_out_of_bounds_are_user_errors() -> None:
    for wrong in ({"port": 0}, {"workers": 0}, {"max_mb": 0}, {"max_images": 0}, {"max_seconds": -1}):
        with pytest.raises(UserError, match="must be"):
            ServeConfig(**wrong)
    assert Limits.of(ServeConfig()) == Limits(64_000_000, 64, 120_000_000, 30)


@pytest.mark.filterwarnings("ignore:(?s).*ype hint:UserWarning")
def test_mlflows_server_is_told_the_limits(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas as pd
    from mlflow.exceptions import MlflowException

    from cxr.serving.pyfunc_model import XrayModel

    model = XrayModel()
    model.predictor = predictor
    many = pd.DataFrame({"image": [text(picture())] * 65})
    assert len(model.predict(None, many)) == 65  # type: ignore[arg-type]
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    with pytest.raises(MlflowException, match="65 images, more than 64"):
        model.predict(None, many)  # type: ignore[arg-type]
    assert len(model.predict(None, many[:64])) == 64  # type: ignore[arg-type]
