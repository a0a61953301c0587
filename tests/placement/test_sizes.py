"""Estimated sizes: measured first, learned next, guessed last. Odd models do not mislead the learning, and every wrong
estimate is counted."""

from hypothesis import given
from hypothesis import strategies as st

from placement.footprint import OVERHEAD_BYTES, SESSION_BYTES, Footprint
from placement.sizes import ENOUGH, MOST, SMALL_BYTES, TYPES, Fit, Sizes, Source

MIB = 1 << 20


def learn(sizes: Sizes, ratio: float, *, model_type: str = "tree", predicted: int = MIB, times: int = 1) -> None:
    for _ in range(times):
        measured = Footprint(round(ratio * MIB) + OVERHEAD_BYTES)
        sizes.learn(model_type, predicted=Footprint(predicted), measured=measured, file_bytes=MIB)


def test_measured_before_learned_before_default():
    """A measured size is preferred to a learned one, and a learned one to the default. The reason shows how a learned
    size was calculated."""
    sizes = Sizes(default_bytes=5 * MIB)
    assert sizes.predict("tree").footprint == Footprint(5 * MIB)
    assert sizes.predict("tree", file_bytes=MIB).footprint == Footprint(MIB + OVERHEAD_BYTES)
    learn(sizes, 4.0, times=ENOUGH)
    learned = sizes.predict("tree", file_bytes=2 * MIB)
    assert learned.footprint == Footprint(8 * MIB + OVERHEAD_BYTES)
    assert learned.source is Source.TYPE
    assert "64.0 KiB and 4 times its file" in learned.why
    measured = sizes.predict("tree", file_bytes=2 * MIB, measured=Footprint(3 * MIB))
    assert (measured.footprint, measured.source) == (Footprint(3 * MIB), Source.MEASURED)


def test_one_odd_model_decides_nothing():
    """Two odd measurements, of 1000 times the file, among five ordinary ones, of twice the file, do not change the
    estimate of their type."""
    sizes = Sizes()
    learn(sizes, 2.0, times=5)
    learn(sizes, 1000.0, times=2)
    assert sizes.fit("tree") == Fit(OVERHEAD_BYTES, 2.0)


def test_small_files_teach_no_slope():
    """Forty models with files of 558 bytes that take 80 KB each say nothing about large files: a model of 20 MB of
    their type is expected to take about the size of its file."""
    sizes = Sizes()
    for _ in range(40):
        sizes.learn("tree", predicted=Footprint(1), measured=Footprint(80_000), file_bytes=558)
    assert sizes.fit("tree") == Fit(80_000 - 558, 1.0)
    assert sizes.predict("tree", file_bytes=558).footprint == Footprint(80_000)
    assert sizes.predict("tree", file_bytes=20 * MIB).footprint == Footprint(20 * MIB + 80_000 - 558)


def test_slope_and_intercept_are_told_apart():
    """The fixed part of a size, and the part that grows with the file, are learned separately, from small files or from
    large ones that differ. Here, the server takes 30 MiB and three times the file."""
    for small in (True, False):
        sizes = Sizes()
        for number in range(1, 8):
            file = 1000 * number if small and number < 4 else number * MIB
            sizes.learn("tree", predicted=Footprint(1), measured=Footprint(30 * MIB + 3 * file), file_bytes=file)
        fit = sizes.fit("tree")
        assert abs(fit.ratio - 3) < 0.01
        assert abs(fit.base_bytes - 30 * MIB) < 10_000
        assert abs(sizes.predict("tree", file_bytes=100 * MIB).footprint.total_bytes - 330 * MIB) < MIB


def test_a_guess_evicts_about_twice_the_file_at_most():
    """An estimate may use all free memory, but evicts copies for about twice the file at most. If even that much room
    is lacking, about the file's size is tried."""
    sizes = Sizes()
    learn(sizes, 25.0, times=ENOUGH)
    guess = sizes.predict("tree", file_bytes=4 * MIB)
    assert guess.footprint == Footprint(100 * MIB + OVERHEAD_BYTES)
    assert guess.steps(Footprint(200 * MIB)) == (guess.footprint,)
    assert guess.steps(Footprint(50 * MIB)) == (Footprint(50 * MIB),)
    twice, once = (Footprint(times * 4 * MIB + OVERHEAD_BYTES) for times in (2, 1))
    assert guess.steps(Footprint(0)) == (twice, once)
    measured = sizes.predict("tree", file_bytes=MIB, measured=Footprint(100 * MIB))
    assert measured.steps(Footprint(0)) == (Footprint(100 * MIB),)


@given(
    loads=st.lists(st.tuples(st.integers(1, 1 << 32), st.integers(1, 1 << 36)), max_size=50),
    file_bytes=st.integers(0, 1 << 36),
    free=st.tuples(st.integers(0, 1 << 36), st.integers(0, 1 << 36)),
    device=st.booleans(),
)
def test_whatever_was_learned_a_guess_evicts_no_more_than_that(loads, file_bytes, free, device):
    """Whatever loads were learned, each step of an estimate evicts copies for at most twice the file and a session
    beyond the free memory, and the last step for at most the file and a session."""
    sizes = Sizes()
    for file, took in loads:
        sizes.learn(
            "t", predicted=Footprint(1), measured=Footprint(took).on(device=device), file_bytes=file, device=device
        )
    guess = sizes.predict("t", file_bytes=file_bytes, device=device)
    steps = guess.steps(Footprint(*free))
    session = OVERHEAD_BYTES + device * SESSION_BYTES
    for step in steps:
        over = max(0, step.host_bytes - free[0]) + max(0, step.device_bytes - free[1])
        assert over <= MOST * file_bytes + session
        assert step.host_bytes <= guess.footprint.host_bytes
        assert step.device_bytes <= guess.footprint.device_bytes
    last = steps[-1]
    assert max(0, last.host_bytes - free[0]) + max(0, last.device_bytes - free[1]) <= file_bytes + session


@given(
    base=st.integers(0, 1 << 28),
    ratio=st.floats(0, 50),
    files=st.lists(st.integers(SMALL_BYTES, 1 << 30), min_size=ENOUGH, max_size=30),
    small=st.lists(st.integers(1, SMALL_BYTES - 1), min_size=ENOUGH, max_size=30),
    odd=st.integers(0, 1 << 40),
)
def test_a_line_is_found_whatever_one_odd_model_takes(base, ratio, files, small, odd):
    """If the sizes of a type's models lie on a line, estimates follow the line, whatever the size of one further model
    is. The weight of small files may shift them a little."""
    sizes = Sizes()
    for file in [*small, *small, *files, *files]:
        sizes.learn("t", predicted=Footprint(1), measured=Footprint(1 + round(base + ratio * file)), file_bytes=file)
    sizes.learn("t", predicted=Footprint(1), measured=Footprint(1 + odd), file_bytes=1 << 20)
    for file in files:
        expected = base + ratio * file
        slack = (1 + 50 + ratio) * SMALL_BYTES * (1 + file / min(files)) + 10
        assert abs(sizes.predict("t", file_bytes=file).footprint.total_bytes - expected) <= slack


def test_what_is_learned_follows_the_times():
    """If a server begins to take half as much, the learned estimate follows within 30 loads."""
    sizes = Sizes()
    learn(sizes, 4.0, times=100)
    learn(sizes, 2.0, times=30)
    assert sizes.fit("tree") == Fit(OVERHEAD_BYTES, 2.0)


def test_a_guess_is_no_reason_to_refuse_a_measurement_is():
    """An estimate larger than any pod is cut to the largest pod and refuses nobody. A measured size is not cut."""
    sizes = Sizes()
    learn(sizes, 50.0, times=ENOUGH)
    assert sizes.predict("tree", file_bytes=MIB, limit_bytes=10 * MIB).footprint.total_bytes == 10 * MIB
    measured = sizes.predict("tree", measured=Footprint(20 * MIB), limit_bytes=10 * MIB)
    assert measured.footprint == Footprint(20 * MIB)


def test_devices_are_another_memory():
    """Weights are expected on the device. A size measured on a device is expected in host memory on pods without a
    device."""
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
    """Estimates that are off by more than a tenth are counted by number and bytes. Loads in a server that does not
    measure do not count."""
    sizes = Sizes()
    for predicted, measured in ((100, 100), (105, 100), (200, 100), (50, 100), (70, 0)):
        sizes.learn("tree", predicted=Footprint(predicted), measured=Footprint(measured))
    statistics = sizes.statistics()
    assert (statistics.predictions, statistics.over, statistics.under) == (4, 1, 1)
    assert (statistics.over_bytes, statistics.under_bytes) == (100, 50)


def test_memory_is_bounded():
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
    """An estimate lies within the observed ratios, and always within the limit."""
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
