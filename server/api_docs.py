"""The page at /docs, FastAPI's own, with all that it loads from here instead of from another site."""

import base64
import hashlib
import re
from pathlib import Path

import fastapi_offline
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.routing import Route

from server.pages import static_route

_FILES = Path(fastapi_offline.__file__).parent / "static"
_LOADED = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")


def docs_routes(title: str) -> list[Route]:
    """A route for the page and for each of its files, which are read now. Links between them are relative."""
    script, style, icon = (f"docs/{name}" for name in _LOADED)
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title=title,
        swagger_js_url=script,
        swagger_css_url=style,
        swagger_favicon_url=icon,
    )
    files = [static_route(f"/docs/{name}", name, (_FILES / name).read_bytes()) for name in _LOADED]
    return [static_route("/docs", "docs.html", bytes(page.body), _policy(bytes(page.body))), *files]


def _policy(page: bytes) -> str:
    """Lets the one script run that stands in the page. Swagger writes styles into elements."""
    (script,) = re.findall(rb"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    return (
        f"default-src 'none'; script-src 'self' 'sha256-{digest}'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
