"""The one definition of skill kept."""

import math

import numpy as np
import pytest

from liborth_cli.measure.retention import retention


def test_it_is_the_share_of_the_gain():
    assert retention(6.0, 2.5, 2.0) == pytest.approx(7 / 8)
    assert retention(2, 2, 1) == 0.0 and retention(2, 1, 1) == 1.0 and retention(2, 0.5, 1) == 1.5


@pytest.mark.parametrize("after", [2.0, 3.0])
def test_where_nothing_was_gained_there_is_nothing_to_keep(after):
    assert math.isnan(retention(2.0, 1.0, after))


def test_resamples_are_taken_one_by_one():
    found = retention(np.array([4.0, 1.0]), np.array([3.0, 1.0]), np.array([2.0, 2.0]))
    assert found[0] == 0.5 and math.isnan(found[1])
