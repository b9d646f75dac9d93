"""Servers, as the tests of the server start them."""

from tests.server.conftest import launch

__all__ = ["launch"]
