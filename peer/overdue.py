"""What to tell a volunteer whose training has not been counted for a while."""

from collections.abc import Iterable

from peer.archive import WHOLE_KEPT, shares
from peer.modules import Held

NOTICE_SLOTS = 3  # without anything counted, before that is said; and again after as many


def last_counted_slot(modules: Iterable[Held], peer: str) -> int:
    """The last slot of which late versions of these count what `peer` trained; -1 if none does."""
    return max(
        (
            share.slot
            for held in modules
            for link in held.chain[-WHOLE_KEPT:]
            for share in shares(link)
            if peer in share.peers
        ),
        default=-1,
    )


def is_worth_a_notice(slots: int) -> bool:
    """Whether to say now that nothing has been counted for so many slots."""
    return slots >= NOTICE_SLOTS and slots % NOTICE_SLOTS == 0


def why_not_counted(modules: Iterable[Held], slot: int) -> str:
    """The likely reason, for a person: who could not be reached, or what was too slow."""
    waiting = [held for held in modules if _last_slot(held) <= slot - NOTICE_SLOTS]
    if waiting:
        names = ", ".join(str(held.module) for held in waiting)
        return f"no new version of module {names}; too few of those who hold it can be reached"
    return "new versions come without it; this line may be too slow for the slot, or the clock off"


def _last_slot(held: Held) -> int:
    return held.certificate.ballot.slot if held.certificate is not None else -NOTICE_SLOTS
