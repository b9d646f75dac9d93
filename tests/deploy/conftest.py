"""Servers, as the tests of the server start them."""

from tests.server.conftest import launch, server

__all__ = ["launch", "server"]
