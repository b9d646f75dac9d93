"""Images of offline conversations. The user of `LLM` is trusted: files and addresses are taken as they are given."""

import base64
import binascii
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from engine.chat_template import image_parts
from engine.image_decode import decode_image

_MAX_PIXELS = 178_956_970
"""As many as Pillow itself takes without complaint."""


def images_of_messages(messages: Sequence[dict[str, Any]]) -> list[Image.Image]:
    """The images of OpenAI messages, in order.

    Raises:
        ValueError: an image cannot be found, fetched or decoded.
    """
    return [_load(_source(part)) for message in messages for part in image_parts(message)]


def fetch_timeout() -> float:
    """Seconds that fetching one image may take: `VLLM_IMAGE_FETCH_TIMEOUT`, default 5.

    Raises:
        ValueError: the variable does not hold a positive number.
    """
    text = os.environ.get("VLLM_IMAGE_FETCH_TIMEOUT", "5")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"VLLM_IMAGE_FETCH_TIMEOUT is {text!r}: it must be a number of seconds above 0")
    return seconds


def _source(part: dict[str, Any]) -> Any:
    source = part.get("image_url", part.get("image", part.get("url")))
    return source.get("url") if isinstance(source, dict) else source


def _load(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, str | Path):
        raise ValueError(f"an image is a {type(source).__name__}: it must be a URL, a path or a PIL image")
    return decode_image(_read(str(source)), max_pixels=_MAX_PIXELS)


def _read(source: str) -> bytes:
    scheme = source.partition(":")[0].lower()
    try:
        if scheme in ("http", "https"):
            response = httpx.get(source, timeout=fetch_timeout(), follow_redirects=True)
            return response.raise_for_status().content
        if scheme == "data":
            return base64.b64decode(source.partition(",")[2], validate=True)
        return Path(source.removeprefix("file://")).read_bytes()
    except (OSError, httpx.HTTPError, httpx.InvalidURL, binascii.Error) as error:
        raise ValueError(f"the image {source[:100]} cannot be read: {error}") from error
