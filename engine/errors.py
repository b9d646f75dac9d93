"""Errors of the engine that a user reads."""


class ModelLoadError(Exception):
    """A model that cannot be loaded; its message is one readable line that says what to do."""


class EngineDeadError(Exception):
    """The engine process has ended, or is about to; nothing can be served."""

    def __init__(self, reason: str = "the engine has stopped") -> None:
        super().__init__(reason)


class QueueFullError(Exception):
    """As many requests wait as are allowed to."""

    def __init__(self) -> None:
        super().__init__("too many requests are waiting: try again later")
