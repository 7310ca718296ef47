"""What a request to the server holds: its limits, and the images in its JSON, in the forms of MLflow's server."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from cxr.config import ServeConfig
from cxr.data.decode import ImageError, pixels_of

_FORMS = ("dataframe_split", "dataframe_records", "instances", "inputs")
_IGNORED = {"params"}  # MLflow's clients may send it; this model has none
_AROUND = 100  # commas and brackets that surround the images


class RequestError(ValueError):
    """A request that is not answered; the message is the reason, and quotes nothing of the request."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may have: its size in bytes, images, pixels of all of them, and seconds to arrive in."""

    size: int
    images: int
    pixels: int
    seconds: float

    @classmethod
    def of(cls, config: ServeConfig) -> Self:
        """The limits that the parameters of `cxr models serve` set."""
        pixels = int(config.max_megapixels * 1e6)
        return cls(int(config.max_mb * 1e6), config.max_images, pixels, config.max_seconds)

    def check_size(self, size: int) -> None:
        """Raises `RequestError` for a request of too many bytes."""
        if size > self.size:
            raise RequestError(f"the request has more than {self.size:,} bytes; send fewer images")

    def check_number(self, count: int) -> None:
        """Raises `RequestError` for no images, or too many."""
        if not count:
            raise RequestError("no image was given")
        if count > self.images:
            raise RequestError(f"{count:,} images, more than {self.images:,} in a request")

    def check_pixels(self, images: Sequence[bytes]) -> None:
        """Raises `RequestError` if the images have too many pixels together, by their headers."""
        total = 0
        for row, image in enumerate(images):
            try:
                total += pixels_of(image)
            except ImageError as error:
                raise RequestError(f"image {row}: {error}") from error
            if total > self.pixels:
                raise RequestError(f"the images have more than {self.pixels:,} pixels together; send fewer of them")


def images_of(body: bytes, limits: Limits) -> list[bytes]:
    """The encoded images of a request. Raises `RequestError` for whatever else it holds."""
    texts = _texts(_parsed(body, limits))
    limits.check_number(len(texts))
    images = [decoded(row, text) for row, text in enumerate(texts)]
    limits.check_pixels(images)
    return images


def _parsed(body: bytes, limits: Limits) -> dict[str, Any]:
    """The JSON object in a body.

    Its commas and brackets are counted first: each may become an object of 60 bytes, and base64 text has none.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > _AROUND + 4 * limits.images:
        raise RequestError(f"more than {limits.images:,} images, or not a list of them as base64 text")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError("not JSON in UTF-8") from error
    if not isinstance(content, dict):
        raise RequestError(f"not a JSON object with one of {', '.join(_FORMS)}")
    return content


def _texts(content: dict[str, Any]) -> list[Any]:
    """The values in the one column of images."""
    given = content.keys() - _IGNORED
    if len(given) != 1 or not given <= set(_FORMS):
        raise RequestError(f"needs exactly one of {', '.join(_FORMS)}")
    (form,) = given
    value = content[form]
    if form == "dataframe_split":
        value = value.get("data") if isinstance(value, dict) else None
    if form == "inputs" and isinstance(value, dict):
        value = next(iter(value.values())) if len(value) == 1 else None
    if not isinstance(value, list):
        raise RequestError(f"{form}: not a list of images")
    return [_only(row) for row in value]


def _only(row: Any) -> Any:
    """The value in a row of one column, whether it has a name or not."""
    values = list(row.values()) if isinstance(row, dict) else row if isinstance(row, list) else [row]
    if len(values) != 1:
        raise RequestError("a row has more than one column, or none; there is one, the image")
    return values[0]


def decoded(row: int, text: Any) -> bytes:
    """The bytes of the image in a row. Raises `RequestError` for what is no base64 text."""
    if not isinstance(text, str):
        raise RequestError(f"image {row}: not base64 text")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise RequestError(f"image {row}: not base64 text; paths and addresses are not read") from error
