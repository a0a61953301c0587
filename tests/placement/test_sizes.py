"""Predicted sizes: measured first, learned next, guessed last; learned robustly and counted honestly."""

from hypothesis import given
from hypothesis import strategies as st

from placement.footprint import OVERHEAD_BYTES, SESSION_BYTES, Footprint
from placement.sizes import ENOUGH, TYPES, Sizes, Source

MIB = 1 << 20


def learn(sizes: Sizes, ratio: float, *, model_type: str = "tree", predicted: int = MIB, times: int = 1) -> None:
    for _ in range(times):
        measured = Footprint(round(ratio * MIB) + OVERHEAD_BYTES)
        sizes.learn(model_type, predicted=Footprint(predicted), measured=measured, file_bytes=MIB)


def test_measured_before_learned_before_default():
    """Each source is used only where the better one has nothing to say, and the reason names it."""
    sizes = Sizes(default_bytes=5 * MIB)
    assert sizes.predict("tree").footprint == Footprint(5 * MIB)
    assert sizes.predict("tree", file_bytes=MIB).footprint == Footprint(MIB + OVERHEAD_BYTES)
    learn(sizes, 4.0, times=ENOUGH)
    learned = sizes.predict("tree", file_bytes=2 * MIB)
    assert learned.footprint == Footprint(8 * MIB + OVERHEAD_BYTES)
    assert learned.source is Source.TYPE
    assert "4 times its file" in learned.why
    measured = sizes.predict("tree", file_bytes=2 * MIB, measured=Footprint(3 * MIB))
    assert (measured.footprint, measured.source) == (Footprint(3 * MIB), Source.MEASURED)


def test_one_odd_model_decides_nothing():
    """A ratio of 1000 among ordinary ones, a model of 101 bytes that takes 4 GB, leaves the type's where it was."""
    sizes = Sizes()
    learn(sizes, 2.0, times=5)
    learn(sizes, 1000.0, times=2)
    assert sizes.ratio("tree") == 2.0


def test_what_is_learned_follows_the_times():
    """A server that takes half as much from now on is believed after a few loads."""
    sizes = Sizes()
    learn(sizes, 4.0, times=100)
    learn(sizes, 2.0, times=30)
    assert sizes.ratio("tree") == 2.0


def test_a_guess_is_no_reason_to_refuse_a_measurement_is():
    """A guess larger than any pod is cut down to it; what was measured is not."""
    sizes = Sizes()
    learn(sizes, 50.0, times=ENOUGH)
    assert sizes.predict("tree", file_bytes=MIB, limit_bytes=10 * MIB).footprint.total_bytes == 10 * MIB
    measured = sizes.predict("tree", measured=Footprint(20 * MIB), limit_bytes=10 * MIB)
    assert measured.footprint == Footprint(20 * MIB)


def test_devices_are_another_memory():
    """Weights are guessed onto the device; what was measured on one stands in host memory elsewhere."""
    sizes = Sizes()
    guess = sizes.predict("net", file_bytes=MIB, device=True).footprint
    assert guess == Footprint(OVERHEAD_BYTES, SESSION_BYTES + MIB)
    measured = Footprint(1, SESSION_BYTES + 10)
    assert sizes.predict("net", measured=measured, device=False).footprint == Footprint(11)
    assert sizes.predict("net", measured=measured, device=True).footprint == measured
    elsewhere = sizes.predict("net", measured=Footprint(OVERHEAD_BYTES + 8 * MIB), device=True, limit_bytes=MIB)
    assert elsewhere.footprint == Footprint(OVERHEAD_BYTES, SESSION_BYTES + 8 * MIB), (
        "a measurement is never cut to what a pod holds"
    )
    assert "without a device" in elsewhere.why


def test_over_and_under_are_counted():
    """Beyond a tenth, by number and bytes; a server that does not measure counts as nothing."""
    sizes = Sizes()
    for predicted, measured in ((100, 100), (105, 100), (200, 100), (50, 100), (70, 0)):
        sizes.learn("tree", predicted=Footprint(predicted), measured=Footprint(measured))
    statistics = sizes.statistics()
    assert (statistics.predictions, statistics.over, statistics.under) == (4, 1, 1)
    assert (statistics.over_bytes, statistics.under_bytes) == (100, 50)


def test_memory_is_bounded():
    """A million types leave no more than some."""
    sizes = Sizes()
    for number in range(5 * TYPES):
        learn(sizes, 1.0, model_type=f"t{number}")
    assert sizes.statistics().types <= 2 * TYPES


@given(
    ratios=st.lists(st.floats(0.1, 100), min_size=ENOUGH, max_size=50),
    file_bytes=st.integers(1, 1 << 40),
    limit=st.integers(1, 1 << 40),
    device=st.booleans(),
)
def test_a_prediction_lies_within_what_was_seen(ratios, file_bytes, limit, device):
    """Learned ratios bound the guess from both sides, and the limit always does."""
    sizes = Sizes()
    for ratio in ratios:
        sizes.learn(
            "t",
            predicted=Footprint(1),
            measured=Footprint(round(ratio * (1 << 30)) + OVERHEAD_BYTES).on(device=device),
            file_bytes=1 << 30,
            device=device,
        )
    total = sizes.predict("t", file_bytes=file_bytes, device=device, limit_bytes=limit).footprint.total_bytes
    assert total <= limit
    slack = OVERHEAD_BYTES + device * SESSION_BYTES + 1
    assert min(limit, min(ratios) * file_bytes * 0.999 - slack) <= total <= max(ratios) * file_bytes * 1.001 + slack
