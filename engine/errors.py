"""Errors of the engine that a user reads."""


class ModelLoadError(ValueError):
    """A model that cannot be loaded; its message is one readable line that says what to do."""


class EngineDeadError(Exception):
    """The engine process has ended, or is about to; nothing can be served."""

    def __init__(self, reason: str = "the engine has stopped") -> None:
        super().__init__(reason)


class QueueFullError(Exception):
    """As many requests wait as are allowed to."""

    def __init__(self) -> None:
        super().__init__("too many requests are waiting: try again later")


def one_line(error: BaseException, longest: int = 300) -> str:
    """A library's message on one line, or the error's kind where there is none."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):
        text = f"{text} is not known"
    return text if len(text) <= longest else text[:longest] + "…"


def count_of(number: int, what: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number} {what}{'s' * (number != 1)}"
