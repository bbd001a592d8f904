"""The soak's own judgement, and a short one."""

import pytest

from .endurance import slope, verdict


def test_a_leak_is_told_from_noise():
    """A slope without its error calls every run a leak, or none."""
    flat = [[i, 10**9 + (i * 7919) % 4096, 9, 3] for i in range(1, 41)]
    assert verdict(flat) == ""
    assert "resident bytes" in verdict([[i, 10**9 + 5000 * i, 9, 3] for i, *_ in flat])
    assert "open files" in verdict([[i, y, 9 + i, 3] for i, y, *_ in flat])
    assert "threads" in verdict([[i, y, 9, i // 2] for i, y, *_ in flat])


@pytest.mark.parametrize("name", ["steps", "evaluations"])
def test_a_few_repetitions_hold_on_to_no_file_and_no_thread(bench, tmp_path, name):
    """One open log a run, and a night of evaluations ends at the limit of open files."""
    wrong = slope(bench.nursery, name, 20, tmp_path / name)
    assert "open files" not in wrong and "threads" not in wrong and "Traceback" not in wrong
