"""What environment variables say."""

import os


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
