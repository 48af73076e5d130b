"""Path choice is a pure function that covers all paths, spreads peers, and settles."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from dipaco.topology import PathID
from peer.assignment import Snapshot, assign_paths, choose_path, keeps

PATHS = [PathID((a, b)) for a in range(2) for b in range(3)]
snapshots = st.builds(
    Snapshot,
    training=st.dictionaries(
        st.text("abcdefgh", min_size=1, max_size=4), st.sampled_from(PATHS), max_size=20
    ),
    progress=st.dictionaries(st.sampled_from(PATHS), st.floats(0, 50)),
)


@given(snapshots)
def test_every_peer_gets_a_path_and_paths_share_evenly(snapshot: Snapshot) -> None:
    assignment = assign_paths(snapshot, PATHS)
    assert assignment.keys() == snapshot.training.keys()
    counts = Counter(assignment.values())
    sizes = [counts[path] for path in PATHS]
    assert max(sizes) - min(sizes) <= 1


@given(snapshots)
def test_an_assignment_is_settled_once_it_is_followed(snapshot: Snapshot) -> None:
    followed = Snapshot(training=assign_paths(snapshot, PATHS), progress=snapshot.progress)
    assert assign_paths(followed, PATHS) == followed.training


def test_a_lone_peer_moves_on_when_its_path_is_well_ahead_and_not_before() -> None:
    here, there = PATHS[0], PATHS[1]
    for ahead, moves in ((0.01, False), (0.5, True)):
        progress = dict.fromkeys(PATHS, 1.0) | {here: 1.0 + ahead}
        assignment = assign_paths(Snapshot(training={"a": here}, progress=progress), PATHS)
        assert (assignment["a"] != here) is moves
    assert there in PATHS


def test_a_joiner_takes_the_path_with_fewest_peers_then_the_most_neglected() -> None:
    training = {str(number): path for number, path in enumerate(PATHS[:4])}
    progress = {PATHS[4]: 2.0, PATHS[5]: 1.0}
    assert choose_path("new", Snapshot(training=training, progress=progress), PATHS) == PATHS[5]


def test_joiners_at_the_same_instant_spread_out() -> None:
    empty = Snapshot(training={}, progress={})
    assert len({choose_path(f"peer{n}", empty, PATHS) for n in range(30)}) == len(PATHS)


def test_each_thing_has_its_number_of_keepers_and_few_move_when_one_leaves() -> None:
    peers = [f"peer{n}" for n in range(20)]
    things = [f"module {n}" for n in range(50)]

    def keepers(of: list[str]) -> dict[str, set[str]]:
        return {t: {p for p in of if keeps(p, t, peers=of, num_keepers=3)} for t in things}

    before, after = keepers(peers), keepers(peers[1:])
    assert all(len(who) == 3 for who in before.values())
    for thing in things:
        assert before[thing] - {"peer0"} <= after[thing]
