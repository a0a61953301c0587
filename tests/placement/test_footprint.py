"""One model, two kinds of pods: what it takes in either memory."""

from hypothesis import given
from hypothesis import strategies as st

from placement.footprint import OVERHEAD_BYTES, SESSION_BYTES, Footprint

sizes = st.integers(0, 1 << 40)


@given(st.builds(Footprint, sizes, sizes), st.booleans())
def test_what_it_is_on_a_pod_it_stays_there(footprint, device):
    """A pod without a device holds nothing on one, a model on a device takes a session there, and nothing else comes
    or goes."""
    there = footprint.on(device=device)
    assert there.on(device=device) == there
    assert bool(there.device_bytes) == device or not there.total_bytes
    assert abs(there.total_bytes - footprint.total_bytes) <= SESSION_BYTES


@given(sizes)
def test_what_was_measured_without_a_device_is_the_same_after_one(host):
    assert Footprint(host).on(device=True).on(device=False) == Footprint(host)


def test_what_was_measured_in_host_memory_is_weights_on_a_device():
    """All but what a session needs of the host's, and a session of the device's besides, however small the model is."""
    assert Footprint(OVERHEAD_BYTES + 40).on(device=True) == Footprint(OVERHEAD_BYTES, SESSION_BYTES + 40)
    assert Footprint(40).on(device=True) == Footprint(40, SESSION_BYTES)
    assert Footprint(10, SESSION_BYTES + 40).on(device=False) == Footprint(50)
    assert Footprint().on(device=True) == Footprint()
