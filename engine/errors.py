"""Errors of the engine that a user reads."""


class ModelLoadError(Exception):
    """A model that cannot be loaded; its message is one readable line that says what to do."""
