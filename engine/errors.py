"""Errors of the engine that a user reads."""


class ModelLoadError(Exception):
    """A model that cannot be loaded; its message is one readable line that says what to do."""


class EngineDeadError(Exception):
    """The engine process has ended; nothing can be served."""

    def __init__(self) -> None:
        super().__init__("the engine has stopped")


class QueueFullError(Exception):
    """As many requests wait as are allowed to."""

    def __init__(self) -> None:
        super().__init__("too many requests are waiting: try again later")
