"""A line of the log for each request."""

import logging
import time
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("server.access")

_CLIENT_CLOSED_REQUEST = 499
_ROUTINE = ("/health", "/metrics")
"""What probes and dashboards ask for every second."""
_LONGEST_PATH = 200
_LONGEST_CLIENT = 100


class AccessLog:
    """Writes down who asked for what and what became of it, when the answer has ended. No query and no header but the
    request's name: they may hold secrets.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Go on, then tell (ASGI)."""
        if scope["type"] != "http" or not logger.isEnabledFor(logging.INFO):
            await self._app(scope, receive, send)
            return
        began, status, is_complete = time.monotonic(), _CLIENT_CLOSED_REQUEST, False

        async def send_noted(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                is_complete = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        finally:
            if not is_complete and status < 400:  # a stream whose reader left
                status = _CLIENT_CLOSED_REQUEST
            _tell(scope, status, 1000 * (time.monotonic() - began))


def _tell(scope: Scope, status: int, milliseconds: float) -> None:
    fields = {
        "method": scope["method"],
        "path": quote(scope["path"])[:_LONGEST_PATH],
        "status": status,
        "duration_ms": round(milliseconds, 1),
        "client": _client(scope),
        "request_id": scope["request_id"],
    }
    is_routine = status == 200 and scope["path"] in _ROUTINE
    logger.log(
        logging.DEBUG if is_routine else logging.INFO,
        '%(client)s - "%(method)s %(path)s" %(status)d in %(duration_ms).1f ms, %(request_id)s',
        {**fields, "client": fields["client"] or "-"},
        extra={"fields": fields},
    )


def _client(scope: Scope) -> str | None:
    """Address and port; none for a Unix socket. A proxy may tell it, and anything in its place."""
    if not scope.get("client"):
        return None
    host, port = scope["client"]
    return ascii(f"{host}:{port}")[1:-1][:_LONGEST_CLIENT]
