"""Groups of ranks: starting a process costs seconds, so most tests share them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from distributed.group import RankGroup


@pytest.fixture(scope="package")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankGroup]:
    """Two ranks, which all tests share."""
    with RankGroup(2, tmp_path_factory.mktemp("pair")) as group:
        yield group


@pytest.fixture(scope="package")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankGroup]:
    """Three ranks, which all tests share."""
    with RankGroup(3, tmp_path_factory.mktemp("trio")) as group:
        yield group


@pytest.fixture
def fresh_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankGroup]:
    """Two ranks of a test's own: it may kill them."""
    with RankGroup(2, tmp_path_factory.mktemp("fresh_pair")) as group:
        yield group
