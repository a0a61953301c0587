"""The footprint of one model on two kinds of pods, in host memory and in device memory."""

from hypothesis import given
from hypothesis import strategies as st

from placement import choice
from placement.footprint import OVERHEAD_BYTES, SESSION_BYTES, Footprint, guess
from placement.pod import Candidate

sizes = st.integers(0, 1 << 40)


@given(st.builds(Footprint, sizes, sizes), st.booleans())
def test_what_it_is_on_a_pod_it_stays_there(footprint, device):
    """On a pod without a device, a footprint has no device memory. On a device, it includes a session. The total
    changes by at most this session."""
    there = footprint.on(device=device)
    assert there.on(device=device) == there
    assert bool(there.device_bytes) == device or not there.total_bytes
    assert abs(there.total_bytes - footprint.total_bytes) <= SESSION_BYTES


@given(sizes)
def test_what_was_measured_without_a_device_is_the_same_after_one(host):
    assert Footprint(host).on(device=True).on(device=False) == Footprint(host)


def test_what_was_measured_in_host_memory_is_weights_on_a_device():
    """A model that was measured in host memory is expected to need its weights and a session on a device. At most the
    overhead of a session stays in host memory."""
    assert Footprint(OVERHEAD_BYTES + 40).on(device=True) == Footprint(OVERHEAD_BYTES, SESSION_BYTES + 40)
    assert Footprint(40).on(device=True) == Footprint(40, SESSION_BYTES)
    assert Footprint(10, SESSION_BYTES + 40).on(device=False) == Footprint(50)
    assert Footprint().on(device=True) == Footprint()


def test_a_guess_is_what_copies_have_on_the_average():
    assert guess([Candidate("a", 1000, 300, copies=2), Candidate("b", 1000, 100, copies=2)]) == Footprint(100)
    assert guess([]) == guess([Candidate("empty", 1000)]) == Footprint()


def test_a_guess_goes_by_devices_where_there_are_any():
    cpu, gpu = (
        Candidate("cpu", 10**9, 10**9, copies=1),
        Candidate("gpu", 10**9, 200, copies=2, device_capacity_bytes=10**9),
    )
    gpu.device_used_bytes = 800
    assert guess([cpu, gpu]) == Footprint(100, 400)
    assert guess([cpu]) == Footprint(10**9)


_pods = st.builds(
    Candidate,
    st.text("abcdef", min_size=1),
    st.integers(1, 1 << 40),
    st.integers(0, 1 << 40),
    st.integers(0, 50),
    device_capacity_bytes=st.just(0) | st.integers(SESSION_BYTES, 1 << 40),
    device_used_bytes=st.integers(0, 1 << 40),
)


@given(st.lists(_pods, min_size=1, max_size=6))
def test_a_guess_is_never_the_reason_why_a_model_is_refused(pods):
    guessed = guess(pods)
    assert choice.choose("m", guessed, pods).refused == ()
