"""Images of offline conversations. The user of `LLM` is trusted: files and addresses are taken as they are given."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
from PIL import Image

from engine.chat_template import IMAGE_TYPES, image_parts
from engine.environment import fetch_timeout
from engine.image_decode import decode_image

_MAX_PIXELS = 178_956_970
"""As many as Pillow itself takes without complaint."""


def check_messages(messages: Any) -> None:
    """Refuse what is no conversation.

    Raises:
        ValueError: something is not of the type that it must have; the message says where.
    """
    if not isinstance(messages, list | tuple):
        raise ValueError(f"a conversation is a {type(messages).__name__}: it must be a list of messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError("a message must be a dict with a `role`")
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, list | tuple):
            raise ValueError(
                f"a message's content is a {type(content).__name__}: it must be a string or a list of parts"
            )
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("text", *IMAGE_TYPES):
                raise ValueError(f"a part of a message has the type {kind!r}: text, image_url and image are known")
            if kind == "text" and not isinstance(part.get("text"), str):
                raise ValueError("a part of the type text must have a string under `text`")


def images_of_messages(messages: Sequence[dict[str, Any]]) -> list[Image.Image]:
    """The images of OpenAI messages, in order.

    Raises:
        ValueError: an image cannot be found, fetched or decoded.
    """
    return [_load(_source(part)) for message in messages for part in image_parts(message)]


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
        if scheme == "file":
            source = unquote(urlsplit(source).path)
        return Path(source).read_bytes()
    except (OSError, httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"the image {source[:100]} cannot be read: {reason}") from error
