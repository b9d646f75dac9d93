"""How log lines look."""

import logging

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def configure_logging(level: str) -> None:
    """Log to standard error from this level on; only warnings from libraries that talk a lot."""
    logging.basicConfig(level=level.upper(), format=_FORMAT, datefmt="%H:%M:%S", force=True)
    for name in ("httpx", "httpcore", "asyncio", "PIL", "urllib3", "huggingface_hub"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
