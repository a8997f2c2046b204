"""The process that hostile files are read in, one for all tests."""

from collections.abc import Iterator

import pytest

from tests.helpers.memory_meter import Meter


@pytest.fixture(scope="session")
def meter() -> Iterator[Meter]:
    """Reads files in children, and tells what became of them."""
    with Meter() as started:
        yield started
