"""Axes of plots for any values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from w2vscale.analysis.report.curves import drawable
from w2vscale.analysis.report.scales import scale_of

VALUES = st.one_of(
    st.floats(),
    st.floats(1e-3, 1e3),
    st.sampled_from([0.0, 5e-324, 1e-310, 1.1e-30, 0.9e30, -0.9e30, 1e308, -1e308]),
)


@pytest.mark.parametrize("logarithmic", [False, True])
@given(values=st.lists(VALUES, max_size=6))
def test_a_scale_has_room_for_all_values_and_some_ticks(logarithmic: bool, values: list[float]) -> None:
    array = drawable(np.array(values))
    scale = scale_of(array, 10.0, 110.0, logarithmic=logarithmic)
    places = scale.place(array)
    expected = np.isfinite(array) & ((array > 0.0) | (not logarithmic))
    assert (np.isfinite(places) == expected).all()
    ticks = scale.ticks(4)
    assert 1 <= len(ticks) <= 20 and ticks == sorted(ticks)
    for place in (*places[expected], *scale.place(np.array(ticks))):
        assert 9.9 <= place <= 110.1


def test_what_cannot_be_calculated_with_is_missing_or_zero() -> None:
    found = drawable(np.array([1e308, -np.inf, np.nan, 5e-324, -1e-310, 2.5]))
    np.testing.assert_array_equal(found, [np.nan, np.nan, np.nan, 0.0, 0.0, 2.5])
