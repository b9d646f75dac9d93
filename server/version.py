"""Which version of this program runs."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def program_version() -> str:
    """The installed version; 0.0.0 where it is not installed."""
    try:
        return version("vlm-server")
    except PackageNotFoundError:
        return "0.0.0"
