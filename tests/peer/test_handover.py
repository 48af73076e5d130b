"""Whom a peer asks for the optimizer's state of a path that it takes."""

from dipaco.topology import ModuleID, PathID
from peer.handover import predecessors
from peer.modules import Held
from tests.peer.test_certificate import ORIGIN, PEERS, certificate, commitment, proposal

PATH = PathID((0, 0))
A, B, C, D = (who.peer_id for who in PEERS[:4])


def held(*slots_and_peers: tuple[int, int]) -> Held:
    """A module whose certificates count, one after another, (slot, number of the peer)."""
    chain = [
        certificate(
            proposal(PEERS[:1], contributions=(commitment(PEERS[who], slot=slot),)), PEERS[:1]
        )
        for slot, who in slots_and_peers
    ]
    return Held(module=ModuleID(1, 0), origin=ORIGIN, chain=chain)


def asked(
    module: Held, *, slot: int, announced: dict[str, PathID] | None = None, has_own: bool = False
) -> list[str]:
    return predecessors(
        PATH, [module], announced=announced or {}, peer=A, slot=slot, has_own=has_own
    )


def test_who_trained_the_path_last_is_asked_first() -> None:
    assert asked(held((1, 1), (2, 2), (3, 1), (4, 3)), slot=5) == [D, B, C]


def test_who_trains_it_now_is_asked_before_all_others() -> None:
    announced = {C: PATH, D: PathID((0, 1))}
    assert asked(held((1, 2), (2, 1)), slot=4, announced=announced) == [C, B]


def test_an_own_state_is_kept_until_another_peers_is_later_by_two_slots() -> None:
    assert asked(held((2, 1), (3, 0), (4, 1)), slot=5, has_own=True) == []
    assert asked(held((2, 1), (3, 0), (5, 1)), slot=6, has_own=True) == [B]
    assert asked(held((2, 1), (3, 0), (4, 1)), slot=5, has_own=False) == [B], "it was lost"


def test_nobody_is_asked_before_anything_was_trained() -> None:
    assert asked(held(), slot=0, announced={B: PATH}) == []
    assert asked(held(), slot=-1, announced={B: PATH}) == []
