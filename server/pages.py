"""The pages for people: the playground at `/` and the dashboard at `/dashboard`, with their files and sample pictures.

They are static and ask for nothing but what any client may ask for.
"""

import hashlib
from pathlib import Path

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engine.args import DEMO_MODEL
from engine.config import EngineConfig

_FILES = Path(__file__).parent / "static"
_SAMPLES = Path(__file__).parent.parent / "demo" / "samples"
_QUESTIONS = {
    "shapes.png": "What is in this picture?",
    "word.png": "What does it say?",
    "chart.jpg": "Which bar is the tallest?",
}
"""One for each sample picture, to which the demo model knows the answer."""
_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".jpg": "image/jpeg",
    ".js": "text/javascript",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Cache-Control": "no-cache",  # each load asks whether the file is still the same
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page_routes(config: EngineConfig) -> list[Route]:
    """A route for each file, which is read now. Pages have no name of their own: links between them are relative."""
    pages = {"/": "playground.html", "/dashboard": "dashboard.html"}
    routes = [static_route(path, name, (_FILES / name).read_bytes()) for path, name in pages.items()]
    for file in sorted(_FILES.iterdir()):
        if file.name not in pages.values():
            routes.append(static_route(f"/playground/{file.name}", file.name, file.read_bytes()))
    samples = _QUESTIONS if _is_demo(config) else {}
    for name in samples:
        routes.append(static_route(f"/playground/samples/{name}", name, (_SAMPLES / name).read_bytes()))
    listed = [{"file": name, "question": question} for name, question in samples.items()]
    return [*routes, static_route("/playground/samples.json", "samples.json", msgspec.json.encode(listed))]


def _is_demo(config: EngineConfig) -> bool:
    return config.model_path.resolve() == DEMO_MODEL.resolve()


def static_route(path: str, name: str, body: bytes, policy: str = _POLICY) -> Route:
    """A file of this name and its bytes, under a Content-Security-Policy."""
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {**_HEADERS, "Content-Security-Policy": policy, "ETag": etag}
    media_type = _TYPES[Path(name).suffix]

    async def send(request: Request) -> Response:
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if etag in known:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type=media_type)

    return Route(path, send, methods=["GET"], include_in_schema=False)
