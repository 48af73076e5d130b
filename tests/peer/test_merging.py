"""What is merged in a crowded round, and what a merged commitment may say."""

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dht.errors import BadMessage
from peer.certificate import check_proposal, counted
from peer.contributions import check_parts
from peer.merging import countable, groups_to_merge
from peer.messages import Commitment, Part
from tests.little_run import identity
from tests.peer.test_certificate import PEERS, commitment, proposal

MANY = [identity(100 + number) for number in range(64)]


def single(number: int, path: str = "0", tokens: int = 10) -> Commitment:
    return commitment(MANY[number], path=path, tokens=tokens)


def merged(parts: Sequence[Commitment], *, signer: int = 0, tokens: int = 0) -> Commitment:
    return commitment(
        MANY[signer],
        path=parts[0].path,
        tokens=tokens or sum(part.tokens for part in parts),
        merged=tuple(Part(peer=part.peer, blob=part.blob) for part in parts),
    )


@given(st.lists(st.integers(0, 5), max_size=64), st.integers(1, 16))
def test_what_is_left_after_merging_fits(paths: list[int], limit: int) -> None:
    singles = [single(number, f"{path}") for number, path in enumerate(paths)]
    groups = groups_to_merge(singles, limit=limit)
    members = [part for group in groups for part in group]
    assert len(set(members)) == len(members)
    left = len(singles) - len(members) + len(groups)
    if len(singles) <= limit:
        assert not groups
    else:
        assert left == max(limit, len(set(paths)))
    for path in set(paths):
        sizes = [len(group) for group in groups if group[0].path == f"{path}"]
        assert all(part.path == group[0].path for group in groups for part in group)
        alone = Counter(map(str, paths))[str(path)] - sum(sizes)
        assert max([*sizes, 1]) - min([*sizes, *([1] if alone else [])] or [1]) <= 1
    assert groups == groups_to_merge(reversed(singles), limit=limit), "whoever looks sees the same"


def test_no_more_is_merged_than_one_commitment_may_claim() -> None:
    group = [single(number, tokens=tokens) for number, tokens in enumerate([40, 60, 20, 30])]
    merged_tokens = {
        most: sorted(c.tokens for c in countable(group, max_tokens=most))
        for most in (150, 149, 90, 89, 60, 59)
    }
    assert merged_tokens == {
        150: [20, 30, 40, 60],
        149: [20, 30, 40],
        90: [20, 30, 40],
        89: [20, 40],
        60: [20, 40],
        59: [40],
    }
    assert merged(countable(group, max_tokens=90)).tokens == 90


def test_a_merged_commitment_goes_before_its_parts_and_nothing_counts_twice() -> None:
    singles = [single(number) for number in range(6)]
    pair, three = merged(singles[:2]), merged(singles[1:4], signer=1)
    chosen = counted([*singles, pair, three], limit=4)
    peers = [part.peer for c in chosen for part in c.parts]
    assert len(set(peers)) == len(peers)
    assert three in chosen
    assert pair not in chosen, "it has a part in common with the larger one"
    assert Counter(len(c.parts) for c in chosen) == {3: 1, 1: 3}


def test_a_proposal_in_which_someone_counts_twice_is_refused() -> None:
    singles = [single(number) for number in range(3)]
    both = sorted([merged(singles[:2]), singles[1]], key=lambda c: c.peer)
    good = sorted([merged(singles[:2]), singles[2]], key=lambda c: c.peer)
    check_proposal(proposal(PEERS[:1], contributions=tuple(good)), sender="leader")
    with pytest.raises(BadMessage, match="twice"):
        check_proposal(proposal(PEERS[:1], contributions=tuple(both)), sender="leader")


def test_a_merged_commitment_must_fit_what_its_parts_committed_to() -> None:
    singles = [single(number, tokens=10 + number) for number in range(3)]
    known = {(c.peer, False): c for c in singles}
    check_parts(merged(singles), known)
    check_parts(merged(singles), {})  # what is not known here cannot be compared
    check_parts(singles[0], known)
    elsewhere = single(2, path="1")
    wrong = {
        "may not": [
            merged(singles, signer=5),
            merged(singles[:1]),
            merged([singles[0], singles[0]]),
        ],
        "nobody has committed": [
            merged([singles[0], commitment(MANY[1], path="0", tokens=11, blob="b" * 64)]),
            commitment(
                MANY[0],
                path="1",
                tokens=21,
                merged=tuple(Part(peer=c.peer, blob=c.blob) for c in singles[:2]),
            ),
            merged([single(0, path="1"), elsewhere]),
        ],
        "number of tokens": [merged(singles, tokens=34), merged(singles, tokens=5)],
    }
    for why, commitments in wrong.items():
        for bad in commitments:
            with pytest.raises(BadMessage, match=why):
                check_parts(bad, known)
    with pytest.raises(BadMessage, match="number of tokens"):
        check_parts(merged(singles, tokens=5), {(singles[0].peer, False): singles[0]})
