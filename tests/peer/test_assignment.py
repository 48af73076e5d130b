"""Path choice is a pure function that shares tokens out by shards, spreads peers, and settles."""

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from dipaco.topology import PathID
from peer.assignment import (
    SLOWER_SHARE,
    Snapshot,
    assign_paths,
    joining_order,
    keeps,
    with_slot_under_way,
)

PATHS = [PathID((a, b)) for a in range(2) for b in range(3)]
EQUAL = dict.fromkeys(PATHS, 1000)
STEPS = 100  # tokens that an ordinary peer trains in a slot

peer_names = st.text("abcdefgh", min_size=1, max_size=4)
snapshots = st.builds(
    Snapshot,
    training=st.dictionaries(peer_names, st.sampled_from(PATHS), max_size=20),
    shard_tokens=st.fixed_dictionaries({path: st.integers(500, 5000) for path in PATHS}),
    tokens=st.dictionaries(st.sampled_from(PATHS), st.integers(0, 50_000)),
    slot_tokens=st.dictionaries(peer_names, st.integers(0, 1000)),
    room_bytes=st.dictionaries(peer_names, st.integers(1, 9)),
    need_bytes=st.dictionaries(st.sampled_from(PATHS), st.integers(1, 9)),
)


def unlimited(snapshot: Snapshot) -> Snapshot:
    return replace(snapshot, room_bytes={})


@given(snapshots)
def test_a_peer_trains_only_what_fits_its_memory_and_something_if_anything_does(
    snapshot: Snapshot,
) -> None:
    assignment = assign_paths(snapshot)
    for peer in snapshot.training:
        fitting = {path for path in PATHS if snapshot.fits(peer, path)}
        assert (peer in assignment) == bool(fitting)
        assert peer not in assignment or assignment[peer] in fitting
        assert set(joining_order(peer, snapshot)) == fitting


@given(snapshots.map(unlimited))
def test_with_peers_enough_no_path_is_left_out(snapshot: Snapshot) -> None:
    counts = Counter(assign_paths(snapshot).values())
    assert len(counts) == len(PATHS) or len(snapshot.training) < len(PATHS)


@given(snapshots, st.integers(0, 50_000))
def test_equal_paths_share_peers_evenly(snapshot: Snapshot, each: int) -> None:
    equal = Snapshot(
        training=snapshot.training, shard_tokens=EQUAL, tokens=dict.fromkeys(PATHS, each)
    )
    peers = list(snapshot.training)
    # From nothing at all, or from where they were left by fewer or more peers.
    for training in ({}, dict.fromkeys(peers, PATHS[0])):
        settled = {}
        for peer in peers:
            now = replace(equal, training=settled | training)
            settled[peer] = training.get(peer, joining_order(peer, now)[0])
        counts = Counter(assign_paths(replace(equal, training=settled)).values())
        sizes = [counts[path] for path in PATHS]
        assert max(sizes) - min(sizes) <= 1


@given(snapshots)
def test_an_assignment_is_settled_once_it_is_followed(snapshot: Snapshot) -> None:
    followed = replace(unlimited(snapshot), training=assign_paths(unlimited(snapshot)))
    assert assign_paths(followed) == followed.training


def after_rounds(snapshot: Snapshot, num_rounds: int) -> tuple[Snapshot, int]:
    """What comes of it when everyone trains a slot and then does as is assigned; all moves."""
    num_moves = 0
    for _ in range(num_rounds):
        trained = with_slot_under_way(snapshot)
        assignment = assign_paths(trained)
        num_moves += sum(assignment[peer] != path for peer, path in snapshot.training.items())
        snapshot = replace(trained, training=assignment)
    return snapshot, num_moves


def started(speeds: list[int], shards: list[int]) -> Snapshot:
    names = [f"peer{number}" for number in range(len(speeds))]
    shard_tokens = dict(zip((PathID((n,)) for n in range(len(shards))), shards, strict=True))
    snapshot = Snapshot(
        training={},
        shard_tokens=shard_tokens,
        slot_tokens=dict(zip(names, speeds, strict=True)),
    )
    for name in names:
        training = {**snapshot.training, name: joining_order(name, snapshot)[0]}
        snapshot = replace(snapshot, training=training)
    return snapshot


def worst_share(snapshot: Snapshot) -> float:
    """How far the tokens of any path are from its shard's share, relative to that."""
    total, shards = sum(snapshot.tokens.values()), sum(snapshot.shard_tokens.values())
    return max(
        abs(snapshot.tokens[path] * shards / (total * shard) - 1)
        for path, shard in snapshot.shard_tokens.items()
    )


@given(st.sampled_from([(3, 4), (2, 4), (5, 9), (8, 9)]), st.data())
def test_fewer_peers_than_paths_give_each_path_its_share(
    size: tuple[int, int], data: st.DataObject
) -> None:
    num_peers, num_paths = size
    shards = data.draw(st.lists(st.integers(1000, 1800), min_size=num_paths, max_size=num_paths))
    end, _ = after_rounds(started([STEPS] * num_peers, shards), 20)
    assert worst_share(end) <= 0.1


def test_a_peer_moves_on_only_when_that_brings_tokens_where_they_are_missing() -> None:
    here, there = PATHS[0], PATHS[1]
    for behind_slots, moves in ((0.2, False), (0.5, True)):
        tokens = {here: 1000, there: round(1000 - behind_slots * STEPS)}
        snapshot = Snapshot(
            training={"a": here},
            shard_tokens={here: 1000, there: 1000},
            tokens=tokens,
            slot_tokens={"a": STEPS},
        )
        assert (assign_paths(snapshot)["a"] == there) is moves


def test_equal_peers_stay_where_they_are_when_all_paths_are_trained() -> None:
    for num_peers in (6, 12):
        _, num_moves = after_rounds(started([STEPS] * num_peers, [1000] * 6), 40)
        assert num_moves == 0


def test_a_slow_peer_changes_places_so_that_no_path_falls_behind() -> None:
    end, num_moves = after_rounds(started([STEPS // 10, *[STEPS] * 3], [1000] * 4), 40)
    assert worst_share(end) < 0.1
    assert num_moves <= 2 * 40
    nearly = started([round(STEPS * SLOWER_SHARE) + 1, *[STEPS] * 3], [1000] * 4)
    assert after_rounds(nearly, 40)[1] == 0, "similar peers need not change places"


def test_joiners_at_the_same_instant_are_on_different_paths_one_round_later() -> None:
    for num_there in range(12):
        before = started([STEPS] * num_there, [1000, 1300, 1500, 1800])
        before = replace(
            before, tokens=dict(zip(before.shard_tokens, (900, 1300, 1400, 2000), strict=True))
        )
        picks = {name: joining_order(name, before)[0] for name in ("one", "two")}
        collided = replace(before, training={**before.training, **picks})
        counts = Counter(assign_paths(with_slot_under_way(collided)).values())
        fewest, most = min(counts[p] for p in before.shard_tokens), max(counts.values())
        assert most - fewest <= 1 or num_there + 2 > 2 * len(before.shard_tokens)
        assert fewest >= 1 or num_there + 2 < len(before.shard_tokens)


def test_a_joiner_takes_a_path_without_a_peer_then_the_one_most_behind() -> None:
    training = {str(number): path for number, path in enumerate(PATHS[:4])}
    snapshot = Snapshot(
        training=training,
        shard_tokens=EQUAL,
        tokens=dict.fromkeys(PATHS, 500) | {PATHS[2]: 0, PATHS[4]: 900, PATHS[5]: 800},
    )
    order = joining_order("new", snapshot)
    assert order[:3] == [PATHS[5], PATHS[4], PATHS[2]]


def test_nobody_goes_to_a_finished_path_while_another_needs_somebody() -> None:
    here, there = PATHS[0], PATHS[1]
    snapshot = Snapshot(
        training={"a": here, "b": here},
        shard_tokens={here: 1000, there: 1000},
        tokens={here: 500, there: 900},
        finished=frozenset([here]),
    )
    assert set(assign_paths(snapshot).values()) == {there}
    assert joining_order("new", snapshot) == [there, here]
    over = replace(snapshot, finished=frozenset([here, there]))
    assert set(assign_paths(over).values()) == {here, there}


def test_joiners_of_a_new_run_spread_out() -> None:
    empty = Snapshot(training={}, shard_tokens=EQUAL)
    assert len({joining_order(f"peer{n}", empty)[0] for n in range(30)}) == len(PATHS)


def test_each_thing_has_its_number_of_keepers_and_few_move_when_one_leaves() -> None:
    peers = [f"peer{n}" for n in range(20)]
    things = [f"module {n}" for n in range(50)]

    def keepers(of: list[str]) -> dict[str, set[str]]:
        return {t: {p for p in of if keeps(p, t, peers=of, num_keepers=3)} for t in things}

    before, after = keepers(peers), keepers(peers[1:])
    assert all(len(who) == 3 for who in before.values())
    for thing in things:
        assert before[thing] - {"peer0"} <= after[thing]
