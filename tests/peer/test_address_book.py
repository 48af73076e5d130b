"""How a peer finds the others, and they it, after it was away."""

import socket
from pathlib import Path

from dht.identity import Identity
from peer.address_book import MAX_PEERS, AddressBook, merged
from peer.ports import as_before, keep_port

RUN = "a" * 64
PEERS = [Identity(bytes([number]) * 32).peer_id for number in range(1, 50)]


def address(peer: str, port: int = 31337) -> str:
    return f"/ip4/203.0.113.7/tcp/{port}/p2p/{peer}"


def test_addresses_survive_a_restart_and_those_seen_last_come_first(tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    book = AddressBook(file, RUN)
    book.note({PEERS[0]: [address(PEERS[0])], PEERS[1]: [address(PEERS[1])]})
    book.note({PEERS[1]: [address(PEERS[1], 4)], PEERS[2]: [address(PEERS[2])]})
    again = AddressBook(file)
    assert again.run == RUN
    assert again.maddrs == [address(PEERS[1], 4), address(PEERS[2]), address(PEERS[0])]
    assert AddressBook(file, "b" * 64).maddrs == []


def test_an_address_of_somebody_else_is_not_noted(tmp_path: Path) -> None:
    book = AddressBook(tmp_path / "peers.json", RUN)
    book.note({PEERS[0]: [address(PEERS[1]), "/ip4/nonsense", ""], PEERS[1]: ()})
    assert book.maddrs == []


def test_who_has_stayed_is_not_driven_out_by_newcomers() -> None:
    known = {peer: [address(peer)] for peer in PEERS[:3]}
    newcomers = {peer: [address(peer)] for peer in PEERS[3:]}
    kept = merged(known, {PEERS[2]: known[PEERS[2]], **newcomers})
    assert len(kept) == MAX_PEERS
    assert next(iter(kept)) == PEERS[2]
    assert PEERS[0] not in kept


def test_a_damaged_book_is_an_empty_one(tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    for text in ("", "[]", '{"run": 1}', '{"run": "a", "peers": {"x": 3}}', '{"peers": []}'):
        file.write_text(text)
        assert AddressBook(file).maddrs == []


def test_a_peer_listens_where_it_did_unless_that_is_taken(tmp_path: Path) -> None:
    file, anywhere = tmp_path / "port", ("/ip4/0.0.0.0/tcp/0",)
    assert as_before(anywhere, file) == anywhere
    for garbage in ("", "x", "0", "70000", "1 2"):
        file.write_text(garbage)
        assert as_before(anywhere, file) == anywhere
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        keep_port([f"/ip4/0.0.0.0/tcp/{port}"], file)
        keep_port(anywhere, file)  # in client mode
        listener.listen()
        assert as_before(anywhere, file) == anywhere
    assert as_before(anywhere, file) == (f"/ip4/0.0.0.0/tcp/{port}",)
    chosen = ("/ip4/0.0.0.0/tcp/31337",)
    assert as_before(chosen, file) == chosen
