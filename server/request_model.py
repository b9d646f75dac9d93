"""What all requests share."""

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import BaseModel, ConfigDict


class RequestModel(BaseModel):
    """Types are not guessed: a number in quotes is no number. Unknown fields are ignored, as OpenAI's clients need."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())

    def keep_only(self, *names: str) -> None:
        """Set all other fields to None: they may be large."""
        for name, value in list(self):
            if value is not None and name not in names:
                setattr(self, name, None)


@contextmanager
def beginning_with(field: str) -> Iterator[None]:
    """Errors begin with the field that they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
