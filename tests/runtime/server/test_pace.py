"""The choice of calls that run in the event loop: by measured time, per size class, and without flapping."""

from mesh.runtime.server.pace import INLINE_NS, THREAD_NS, Pace

SIZE = 300
FAST, SLOW = INLINE_NS // 10, THREAD_NS * 10


def inline(pace: Pace, size: int) -> bool:
    return pace.inline[size.bit_length()]


def test_what_was_never_seen_runs_in_a_thread():
    assert not any(inline(Pace(), size) for size in (0, 1, SIZE, 1 << 40))


def test_a_short_call_vouches_for_its_class_and_all_smaller_ones():
    pace = Pace()
    pace.note(SIZE, FAST)
    assert inline(pace, 0)
    assert inline(pace, SIZE)
    assert inline(pace, 511)
    assert not inline(pace, 512)


def test_a_long_call_says_nothing_of_smaller_ones():
    """A long call does not affect smaller size classes, which are tried in a thread first."""
    pace = Pace()
    pace.note(SIZE, SLOW)
    assert not inline(pace, SIZE)
    pace.note(10, FAST)
    assert inline(pace, 10)
    assert not inline(pace, SIZE)


def test_a_smaller_class_known_to_be_slow_is_not_made_fast_by_a_larger_one():
    pace = Pace()
    pace.note(10, SLOW)
    pace.note(SIZE, FAST)
    assert not inline(pace, 10)
    assert inline(pace, 100)


def test_one_outlier_moves_nothing_and_a_lasting_change_does():
    """A single outlier, such as a second of page faults, changes nothing. A size class that stays slow leaves the loop
    within ten calls."""
    pace = Pace()
    for _ in range(10):
        pace.note(SIZE, FAST)
    pace.note(SIZE, 10**9)
    assert inline(pace, SIZE)
    calls = 0
    while inline(pace, SIZE):
        pace.note(SIZE, SLOW)
        calls += 1
    assert calls <= 10


def test_outliers_of_a_busy_machine_do_not_move_a_fast_class():
    """A fast size class stays in the loop although every fifth call takes a second."""
    pace = Pace()
    for number in range(1, 1001):
        pace.note(SIZE, FAST if number % 5 else 10**9)
        assert inline(pace, SIZE)


def test_between_the_limits_nothing_changes():
    between = (INLINE_NS + THREAD_NS) // 2
    for first, expected in ((FAST, True), (SLOW, False)):
        pace = Pace()
        pace.note(SIZE, first)
        for _ in range(100):
            pace.note(SIZE, between)
        assert inline(pace, SIZE) is expected


def test_a_class_that_became_fast_comes_back():
    pace = Pace()
    pace.note(SIZE, SLOW)
    for _ in range(60):
        pace.note(SIZE, FAST)
    assert inline(pace, SIZE)


def test_a_call_that_had_to_be_stopped_takes_its_class_out_of_the_loop():
    """After a call that had to be stopped, its size class leaves the loop at once, whatever its mean. Smaller classes
    stay."""
    pace = Pace()
    for _ in range(100):
        pace.note(SIZE, FAST)
    pace.too_long(SIZE)
    assert not inline(pace, SIZE)
    assert inline(pace, 10)


def test_sizes_beyond_all_classes_are_harmless():
    """Calls larger than all size classes run in threads."""
    pace = Pace()
    pace.note(1 << 60, FAST)
    pace.too_long(1 << 60)
    assert not any(pace.inline)
