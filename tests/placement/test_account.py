"""The account of a pod with a foreign server: the sizes of its models, and the factor that adapts the books to the
observed memory."""

from hypothesis import given
from hypothesis import strategies as st

from placement.account import LEAST, MOST, REFUTED, SLACK_BYTES, Factor, Growth, SizeBasis, settle
from placement.footprint import Footprint
from placement.sizes import Sizes

MIB = 1 << 20
GIB = 1 << 30
CAPACITY = GIB

sizes = st.integers(0, 2 * GIB)
stated = st.one_of(sizes, st.integers(0, (1 << 64) - 1))
growths = st.none() | st.builds(
    Growth, st.integers(-GIB, 2 * GIB), alone=st.booleans(), fresh=st.booleans(), first=st.booleans()
)


def settled(**given):
    arguments = {"said": 0, "predicted": 0, "reserved": MIB, "free": GIB, "capacity": CAPACITY, "growth": None}
    return settle(**arguments | given)


def test_a_servers_word_counts():
    """A size that the server states is used, whether or not the server's memory is observed."""
    for growth in (None, Growth(50 * MIB), Growth(0)):
        found = settled(said=7 * MIB, predicted=50 * MIB, growth=growth)
        assert (found.bytes, found.basis) == (7 * MIB, SizeBasis.SAID)


def test_without_a_word_the_larger_of_growth_and_prediction_counts():
    """If the server states no size for a model, the size is the growth of the memory, or the prediction if that is
    larger."""
    larger = settled(predicted=5 * MIB, growth=Growth(9 * MIB))
    assert (larger.bytes, larger.basis, larger.guessed) == (9 * MIB, SizeBasis.GROWN, False)
    smaller = settled(predicted=9 * MIB, growth=Growth(5 * MIB))
    assert (smaller.bytes, smaller.basis, smaller.least_bytes) == (9 * MIB, SizeBasis.GUESSED, 5 * MIB)


def test_a_lie_that_cannot_be_true_is_no_word():
    """Stated sizes that are zero, negative, or beyond the capacity do not count if the memory shows another size."""
    for said in (0, (1 << 64) - 5 * MIB, 1 << 62, CAPACITY + 1):
        found = settled(said=said, predicted=MIB, growth=Growth(9 * MIB))
        assert (found.bytes, found.basis) == (9 * MIB, SizeBasis.GROWN)
    for said in ((1 << 64) - 5 * MIB, 1 << 62):
        found = settled(said=said, predicted=MIB, remembered=1 << 62)
        assert (found.bytes, found.basis) == (MIB, SizeBasis.GUESSED), "nor if nothing is observed"


def test_a_server_that_is_not_believed_only_predicts():
    found = settled(said=MIB, growth=Growth(9 * MIB), believed=False)
    assert (found.bytes, found.basis) == (9 * MIB, SizeBasis.GROWN)
    assert settled(said=20 * MIB, growth=Growth(9 * MIB), believed=False).guessed


def test_a_growth_beside_other_loads_is_no_measurement():
    """The growth of a load that did not run alone may belong to another load, so it is not used."""
    found = settled(predicted=2 * MIB, growth=Growth(100 * MIB, alone=False))
    assert (found.bytes, found.guessed) == (2 * MIB, True)


def test_the_first_load_is_not_remembered():
    """The growth of a server's first load counts on the books but is not remembered for the model, because it includes
    libraries."""
    found = settled(predicted=2 * MIB, growth=Growth(100 * MIB, first=True, fresh=True))
    assert (found.bytes, found.guessed) == (100 * MIB, True)


def test_a_remembered_size_that_is_wrong_is_forgotten():
    """A remembered size that later loads do not confirm shrinks to the observed growth within eight loads."""
    remembered = 100 * MIB
    for _ in range(8):
        remembered = settled(remembered=remembered, growth=Growth(3 * MIB)).bytes
    assert remembered == 3 * MIB


@given(
    stated, stated, sizes, st.integers(0, CAPACITY), st.integers(-GIB, CAPACITY), st.integers(1, CAPACITY), growths,
    st.booleans(),
)  # fmt: skip
def test_no_size_falls_below_what_was_measured(said, predicted, remembered, reserved, free, capacity, growth, believed):
    """A settled size is never below the growth of a load that ran alone, unless the server states the size. An estimate
    exceeds the measured or reserved size by no more than the free memory, so that it evicts nothing."""
    reserved = min(reserved, capacity)
    found = settle(
        said=said,
        predicted=predicted,
        remembered=remembered,
        reserved=reserved,
        free=free,
        capacity=capacity,
        growth=growth,
        believed=believed,
    )
    assert found.bytes >= 0
    if growth is None or found.basis is SizeBasis.SAID:
        return
    grown = max(0, growth.bytes) if growth.alone else 0
    assert found.bytes >= grown
    assert found.least_bytes <= found.bytes
    if found.basis is SizeBasis.GUESSED:
        assert found.bytes <= max(grown, reserved + max(0, free))


@given(st.integers(1, 200 * MIB), st.integers(0, 64 * MIB), st.floats(LEAST, MOST))
def test_a_guess_evicts_about_twice_its_file_with_any_factor(file_bytes, base, value):
    """An estimate that is multiplied by the pod's factor still evicts no more than about twice the size of the model's
    file."""
    known, factor = Sizes(), Factor()
    factor.value = value
    for _ in range(5):
        known.learn("t", predicted=Footprint(1), measured=Footprint(base + 50 * file_bytes), file_bytes=file_bytes)
    guess = known.predict("t", file_bytes=file_bytes)
    counted = guess.of(factor.scaled(guess.footprint, guessed=True, least_bytes=file_bytes))
    assert counted.steps(Footprint())[0].total_bytes <= 2 * file_bytes + MIB


looks = st.lists(st.tuples(st.integers(0, 64 * GIB), st.integers(0, 8 * GIB), st.floats(0, 100)), max_size=40)


@given(looks)
def test_the_factor_is_bounded(seen):
    factor = Factor()
    for observed, accounted, seconds in seen:
        factor.look(observed, accounted, capacity=CAPACITY, seconds=seconds)
        assert LEAST <= factor.value <= MOST


@given(looks, sizes, st.booleans(), sizes)
def test_a_counted_size_is_never_below_what_was_measured(seen, size, guessed, least):
    """Whatever the factor, a measured or stated size counts in full, and an estimate counts with at least its measured
    part."""
    factor, least = Factor(), min(least, size)
    for observed, accounted, seconds in seen:
        factor.look(observed, accounted, capacity=CAPACITY, seconds=seconds)
    counted = factor.scaled(Footprint(size, 7), guessed=guessed, least_bytes=least)
    assert counted.device_bytes == 7
    assert counted.host_bytes >= (least if guessed else size)
    assert counted.host_bytes <= MOST * size + 1


@given(st.integers(SLACK_BYTES, 16 * GIB), st.integers(MIB, 4 * GIB))
def test_the_books_settle_at_what_is_observed(observed, accounted):
    """If memory and books stay as they are, the books with their factor reach the observed memory, within the bounds of
    the factor and the slack. They do not exceed the observed memory by more than they did before."""
    factor = Factor()
    for _ in range(200):
        factor.look(observed, accounted, capacity=CAPACITY, seconds=1.0)
    books = factor.value * accounted
    slack = max(SLACK_BYTES, CAPACITY // 50)
    assert books >= 0.99 * min(observed - slack, MOST * accounted)
    assert books <= 1.01 * max(observed, LEAST * accounted, accounted if observed > accounted else 0)


def test_one_look_decides_nothing():
    """A peak of memory that lasts one second moves the factor only a small part of the way."""
    factor = Factor()
    factor.look(4 * GIB, GIB, capacity=2 * GIB, seconds=1.0)
    assert 1.0 < factor.value < 1.7


def test_loads_that_no_factor_explains_refute_at_once():
    """Three loads in a row, after each of which the server's memory is far beyond its stated sizes, refute these sizes.
    Two loads do not."""
    factor = Factor()
    for observed in (GIB, GIB, MIB, GIB, GIB):
        factor.loaded(observed, MIB, capacity=CAPACITY)
        assert factor.believed
    factor.loaded(GIB, MIB, capacity=CAPACITY)
    assert not factor.believed
    assert factor.value == MOST


def test_sizes_are_refuted_for_good():
    """Once a server's memory has refuted its stated sizes, they are not believed again, even if its memory later agrees
    with the books."""
    factor = Factor()
    for _ in range(60):
        factor.look(GIB, GIB // 100, capacity=CAPACITY, seconds=1.0)
    assert factor.value >= REFUTED
    assert not factor.believed
    for _ in range(200):
        factor.look(GIB, GIB, capacity=CAPACITY, seconds=1.0)
    assert factor.value < 1.01
    assert not factor.believed
