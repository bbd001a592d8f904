"""One warm interpreter for all tests of this folder that kill, starve or signal a command."""

import pytest

from .kill import Bench
from .nursery import Nursery


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    nursery = Nursery(tmp_path_factory.mktemp("faults"))
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def bench(nursery, tmp_path_factory):
    if not nursery.preloaded:
        pytest.skip("needs Linux and a C compiler")
    return Bench(nursery, tmp_path_factory.mktemp("bench") / "bench")
