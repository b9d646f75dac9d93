"""How log lines look."""

import json
import logging
import sys
import threading
from datetime import UTC, datetime

LOG_FORMATS = ("text", "json")

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """One JSON object a line. What a record has as `fields`, a dict given as its `extra`, stands beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        """A record's line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_logging(level: str, log_format: str = "text") -> None:
    """Log to standard error from this level on; only warnings from libraries that talk a lot."""
    logging.basicConfig(level=level.upper(), format=_FORMAT, datefmt="%H:%M:%S", force=True)
    for name in ("httpx", "httpcore", "asyncio", "PIL", "urllib3", "huggingface_hub"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
    if log_format == "json":
        _write_json()


def _write_json() -> None:
    """Whatever else would write to standard error in a form of its own goes through the log."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonFormatter())
    for name in tuple(logging.Logger.manager.loggerDict):
        library = logging.getLogger(name)
        if library.handlers:
            library.handlers.clear()
            library.propagate = True
    logging.captureWarnings(True)
    sys.excepthook = lambda *error: logging.critical("the process ends by an exception", exc_info=error)
    threading.excepthook = lambda args: logging.critical(
        "a thread ends by an exception", exc_info=(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback)
    )
