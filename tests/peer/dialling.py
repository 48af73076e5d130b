"""What a peer that dials back is made of, without a network."""

from __future__ import annotations

from dht.errors import Unreachable


class FakeSwarm:
    """Sees the asker at some addresses, and is at others itself."""

    def __init__(self, asker: str, seen_at: list[str], own: list[str]) -> None:
        self.seen = {asker: seen_at}
        self.own = own

    async def connections(self) -> dict[str, list[str]]:
        return self.seen

    async def maddrs(self) -> list[str]:
        return self.own


class Dials:
    """Records whom p2pd was made to dial, and answers with the key that is met there."""

    def __init__(self, keys: dict[str, str]) -> None:
        self.keys = keys
        self.maddrs: list[str] = []

    async def __call__(self, maddr: str, *, timeout_seconds: float) -> str:
        self.maddrs.append(maddr)
        where = maddr.split("/p2p/")[0]
        if where not in self.keys:
            raise Unreachable("connection refused")
        raise Unreachable(
            f"peer id mismatch: expected X, but remote key matches {self.keys[where]}"
        )
