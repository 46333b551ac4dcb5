import random
import time
from email.utils import formatdate

import pytest

from frpo.rewards.judges.retries import retry_after_s, wait_s


def waits(retry, header, times):
    draw = random.Random(0)
    return [wait_s(retry, header, first_s=1.0, longest_s=5.0, draw=draw) for _ in range(times)]


def test_waits_double_up_to_the_bound_with_full_jitter():
    for retry, bound in [(0, 1.0), (1, 2.0), (2, 4.0), (3, 5.0), (2000, 5.0)]:
        seconds = waits(retry, None, 2000)
        assert 0.0 <= min(seconds) < 0.01 * bound
        assert 0.99 * bound < max(seconds) <= bound
        assert sum(seconds) / len(seconds) == pytest.approx(bound / 2, rel=0.05)


def test_retry_after_is_a_floor_bounded_above():
    assert 3.0 <= min(waits(9, "3", 200)) < max(waits(9, "3", 200)) <= 4.0
    assert 5.0 <= waits(0, "3600", 1)[0] <= 6.0


@pytest.mark.parametrize(
    ("header", "seconds"), [("2", 2.0), ("0.5", 0.5), ("-3", 0.0), ("nan", None), ("inf", None), ("soon", None)]
)
def test_retry_after_in_seconds(header, seconds):
    assert retry_after_s(header) == seconds


def test_retry_after_as_a_date():
    began = int(time.time())
    waits = retry_after_s(formatdate(began + 1000, usegmt=True))
    assert 1000 - (time.time() - began) <= waits <= 1000
    assert retry_after_s(formatdate(began - 30, usegmt=True)) == 0.0
    assert retry_after_s(None) is None
