"""Which chunks are asked of whom: what is free first, then what somebody slow still owes."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from dipaco.digest import CHUNK_BYTES
from peer.blob_server import MAX_CHUNKS_PER_REQUEST, WINDOW_CHUNKS
from peer.chunk_plan import (
    GRANT_SECONDS,
    HEDGE_SECONDS,
    Choice,
    Run,
    Source,
    View,
    choose_chunks,
    has_room,
    is_nearly_done,
)

NOW = 100.0


def view(
    *sources: Source, missing: set[int] | None, chunks_per_second: dict[str, float] | None = None
) -> View:
    rates = {peer: rate * CHUNK_BYTES for peer, rate in (chunks_per_second or {}).items()}
    return View(sources=sources, missing=missing, rates=rates, now=NOW)


def choose(source: Source, seen: View) -> Choice | None:
    return choose_chunks(source, seen, Random(0))


def asked(*chunks: int, seconds_ago: float = 0.0) -> Run:
    """A request that is not answered yet."""
    return Run(list(chunks), NOW - seconds_ago)


def sending(*due: int, seconds_ago: float = 0.0) -> Run:
    return Run(list(due), NOW - seconds_ago, is_granted=True, due=list(due))


def test_only_who_is_known_to_be_good_and_almost_done_is_asked_for_more() -> None:
    assert has_room(Source("idle"))
    assert not has_room(Source("new", [sending(1)]))
    assert has_room(Source("good", [sending(1)], last_end_time=1.0))
    assert not has_room(Source("good", [sending(1, 2)], last_end_time=1.0))
    assert not has_room(Source("good", [asked(1)], last_end_time=1.0))
    assert not has_room(Source("good", [sending(1), sending()], last_end_time=1.0))


def test_nobody_else_is_asked_while_the_rest_is_here_in_no_time() -> None:
    rates = {"fast": 10.0}
    fast = Source("fast", [sending(*range(8))])
    assert is_nearly_done(view(fast, missing=set(range(19)), chunks_per_second=rates))
    assert not is_nearly_done(view(fast, missing=set(range(20)), chunks_per_second=rates))
    assert not is_nearly_done(view(fast, missing=set(range(19)))), "it may be slow"
    silent = Source("fast", [sending(*range(8), seconds_ago=HEDGE_SECONDS)])
    assert not is_nearly_done(view(silent, missing={1}, chunks_per_second=rates))


def test_the_index_is_asked_of_another_one_when_the_first_is_silent() -> None:
    assert not is_nearly_done(view(Source("idle"), missing=None))
    assert is_nearly_done(view(Source("asked", [asked()]), missing=None))
    silent = Source("asked", [asked(seconds_ago=HEDGE_SECONDS)])
    assert not is_nearly_done(view(silent, missing=None))


def test_who_is_not_known_is_asked_for_one_chunk_out_of_half_of_all() -> None:
    source = Source("new")
    choice = choose(source, view(source, missing=set(range(40))))
    assert choice is not None
    assert choice.num_chunks == 1
    assert len(choice.chunks) == 20


def test_a_source_is_asked_for_its_share_and_for_no_more_than_a_run() -> None:
    slow, fast = Source("slow"), Source("fast")
    rates = {"slow": 1.0, "fast": 3.0}
    for num_free, of_slow, of_fast in [(40, 4, 8), (8, 2, 6), (1, 1, 1)]:
        seen = view(fast, slow, missing=set(range(num_free)), chunks_per_second=rates)
        choices = [choose(slow, seen), choose(fast, seen)]
        assert [c.num_chunks for c in choices if c is not None] == [of_slow, of_fast]


def test_one_that_could_send_all_the_rest_in_no_time_is_asked_for_all_of_it() -> None:
    fast, other = Source("fast"), Source("other")
    seen = view(fast, other, missing=set(range(6)), chunks_per_second={"fast": 4.0, "other": 4.0})
    choice = choose(fast, seen)
    assert choice is not None
    assert choice.num_chunks == 6


def test_who_is_not_ready_takes_no_share() -> None:
    source, paused = Source("source"), Source("paused", ready_time=NOW + 1.0)
    rates = {"source": 1.0, "paused": 3.0}
    choice = choose(source, view(source, paused, missing=set(range(4)), chunks_per_second=rates))
    assert choice is not None
    assert choice.num_chunks == 4


def test_what_another_one_sends_or_may_choose_is_not_asked_for() -> None:
    idle = Source("idle")
    missing = {0, 1, 2, 3}
    seen = view(idle, Source("a", [sending(0)]), Source("b", [asked(1, 2)]), missing=missing)
    assert choose(idle, seen) == Choice([3], 1)
    nothing_free = view(idle, Source("b", [asked(*missing)]), missing=missing)
    assert choose(idle, nothing_free) is None
    undecided = Source("b", [asked(*missing, seconds_ago=GRANT_SECONDS)])
    assert choose(idle, view(idle, undecided, missing=missing)) is not None


def test_a_request_speaks_of_one_window() -> None:
    source = Source("source")
    choice = choose(source, view(source, missing={5, 5 + WINDOW_CHUNKS - 1, 5 + WINDOW_CHUNKS}))
    assert choice is not None
    assert max(choice.chunks) < 5 + WINDOW_CHUNKS


def test_the_last_chunk_of_a_much_slower_source_is_taken_over_once() -> None:
    idle, slow = Source("idle"), Source("slow", [sending(7, 8)])
    rates = {"idle": 1.0, "slow": 0.25}
    seen = view(idle, slow, missing={7, 8}, chunks_per_second=rates)
    assert choose(idle, seen) == Choice([8], 1), "it would come in 8 s; 7 in only 4"
    hedger = Source("hedger", [sending(8)])
    twice = view(idle, slow, hedger, missing={7, 8}, chunks_per_second={**rates, "hedger": 1.0})
    assert choose(idle, twice) == Choice([7], 1)
    even = view(idle, slow, missing={7, 8}, chunks_per_second={"idle": 1.0, "slow": 1.0})
    assert choose(idle, even) is None
    assert choose(slow, seen) is None, "it is at work"


def test_a_source_that_has_stopped_sending_is_late_however_fast_it_was() -> None:
    idle, stuck = Source("idle"), Source("stuck", [sending(7, seconds_ago=4.0)])
    rates = {"idle": 1.0, "stuck": 100.0}
    assert choose(idle, view(idle, stuck, missing={7}, chunks_per_second=rates)) == Choice([7], 1)


@given(
    missing=st.sets(st.integers(0, 700), min_size=1, max_size=60),
    runs=st.lists(st.tuples(st.sets(st.integers(0, 700), max_size=8), st.booleans()), max_size=4),
    rate=st.none() | st.floats(0.001, 1000.0),
)
def test_nothing_comes_twice_while_anything_is_free(
    missing: set[int], runs: list[tuple[set[int], bool]], rate: float | None
) -> None:
    idle = Source("idle")
    others = [
        Source(f"other{number}", [sending(*chunks & missing) if granted else asked(*chunks)])
        for number, (chunks, granted) in enumerate(runs)
    ]
    rates = {} if rate is None else {"idle": rate}
    choice = choose(idle, view(idle, *others, missing=missing, chunks_per_second=rates))
    under_way = (run for other in others for run in other.runs)
    free = missing.difference(*(run.due if run.is_granted else run.wanted for run in under_way))
    if choice is None:
        assert not free
        return
    assert set(choice.chunks) <= (free or missing)
    assert list(choice.chunks) == sorted(choice.chunks)
    assert 1 <= choice.num_chunks <= min(len(choice.chunks), MAX_CHUNKS_PER_REQUEST)
    assert choice.chunks[-1] - choice.chunks[0] < WINDOW_CHUNKS
