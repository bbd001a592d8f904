"""One warm interpreter for all tests of this folder that kill, starve or signal a command."""

import pytest

from .kill import Bench
from .nursery import Nursery


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    nursery = Nursery(folder)
    if not nursery.preloaded:
        nursery.close()
        pytest.skip("needs Linux and a C compiler")
    yield Bench(nursery, folder / "bench")
    nursery.close()
