"""One model, two kinds of pods: what it takes in either memory."""

from hypothesis import given
from hypothesis import strategies as st

from placement.footprint import OVERHEAD_BYTES, Footprint

sizes = st.integers(0, 1 << 40)


@given(st.builds(Footprint, sizes, sizes), st.booleans())
def test_no_byte_is_lost_or_made_up_on_the_way_to_another_pod(footprint, device):
    """And a pod without a device holds nothing on one."""
    there = footprint.on(device=device)
    assert there.total_bytes == footprint.total_bytes
    assert device or not there.device_bytes
    assert there.on(device=device) == there


def test_what_was_measured_in_host_memory_is_weights_on_a_device():
    """All but what a session needs of the host's, and nothing of a model that is smaller than that."""
    assert Footprint(OVERHEAD_BYTES + 40).on(device=True) == Footprint(OVERHEAD_BYTES, 40)
    assert Footprint(40).on(device=True) == Footprint(40)
    assert Footprint(10, 40).on(device=True) == Footprint(10, 40)
    assert Footprint(10, 40).on(device=False) == Footprint(50)
