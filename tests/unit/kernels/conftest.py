"""The instruction sets of this machine, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from graft.kernels.cpu import library


@pytest.fixture(params=[] if library.problem() else library.tiers())
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of one that the compiled kernels run on during the test."""
    library.force_tier(request.param)
    yield request.param
    library.force_tier(None)
