"""What makes hivemind's DHT safe against hostile peers.

hivemind is composed, never changed, and its DHT trusts its peers. This file closes what an attacker
could use; `tests/attacks` shows each attack, and that it works against stock hivemind:

- a node's place in the routing table is bound to its peer ID, which TLS proves: no routing entry
  is taken over by a ping or by a lie in a list of neighbors, and no ID is chosen to own a key;
- the storage holds records of ours only, is bounded, and a write that it refuses changes nothing;
- there is no cache that others can fill, so that what is read is fresh;
- an answer with more entries than a key can have is dropped before it is verified.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hivemind.dht.crypto import DHTRecord, RecordValidatorBase
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import PeerID
from hivemind.utils.timed_storage import ValueWithExpiration, get_dht_time

from dht.swarm import MAX_SUBKEYS
from dht.validation import check

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from hivemind.dht.protocol import DHTProtocol

    from dht.storage import Entry, RecordStorage

Found = tuple[ValueWithExpiration | None, dict[DHTID, PeerID]]
"""One node's answer to a search: what it has under the key, and whom it knows nearby."""


def node_id_of(peer_id: PeerID) -> DHTID:
    """The only place in the DHT that a peer can have: the SHA-1 of its peer ID."""
    return DHTID.generate(source=peer_id.to_bytes())


class Validator(RecordValidatorBase):  # type: ignore[misc]
    """hivemind's hook for `dht.validation`: called before storing, and on what was found."""

    def validate(self, record: DHTRecord) -> bool:
        """Whether this is a record of ours."""
        return check(
            key_bytes=record.key,
            subkey_bytes=record.subkey,
            value_bytes=record.value,
            expiration_time=record.expiration_time,
            now=get_dht_time(),
        )


class HivemindStorage:
    """`RecordStorage` as hivemind's `DHTLocalStorage`: the same methods, and its types."""

    def __init__(self, storage: RecordStorage) -> None:
        self._storage = storage

    def store(
        self, key: DHTID, value: object, expiration_time: float, subkey: str | None = None
    ) -> bool:
        """Only entries of dictionaries are taken."""
        if subkey is None or not isinstance(value, bytes):
            return False
        return self.store_subkey(key, subkey, value, expiration_time)

    def store_subkey(self, key: DHTID, subkey: str, value: bytes, expiration_time: float) -> bool:
        """Whether the entry is kept; one that is refused changes nothing."""
        return self._storage.store(key.to_bytes(), subkey, value, expiration_time)

    def get(self, key: DHTID) -> ValueWithExpiration | None:
        """All entries under a key."""
        entries = self._storage.get(key.to_bytes())
        return _dictionary(entries) if entries else None

    def items(self) -> list[tuple[DHTID, ValueWithExpiration]]:
        """All keys, each with its entries."""
        keys = self._storage.keys()
        return [(DHTID.from_bytes(key), _dictionary(self._storage.get(key))) for key in keys]


class _NoCache:
    """In place of hivemind's cache, which others could fill, and which answers before storage."""

    def store(self, *_: object, **__: object) -> bool:
        return False

    store_subkey = store

    def get(self, key: DHTID) -> None:
        """Nothing is ever there."""

    def __contains__(self, key: DHTID) -> bool:
        return False


def _dictionary(entries: Mapping[str, Entry]) -> ValueWithExpiration:
    """hivemind's type for a dictionary of records, with the latest expiration time in it.

    It is frozen, since otherwise merging in an older copy of an entry would remove the newer one.
    """
    dictionary = DictionaryDHTValue()
    dictionary.frozen = True
    for subkey, (value, expiration_time) in entries.items():
        dictionary.store(subkey, value, expiration_time)
    return ValueWithExpiration(dictionary, dictionary.latest_expiration_time)


def harden(protocol: DHTProtocol, storage: RecordStorage) -> None:
    """Close the holes that the module's docstring names, in a node's `DHTProtocol`.

    That it validates records must be said when it is made: with a `Validator`.
    """
    protocol.storage = HivemindStorage(storage)
    protocol.cache = _NoCache()
    update_routing_table = protocol.update_routing_table
    call_find = protocol.call_find
    is_dictionary_valid = protocol._validate_dictionary

    async def update_if_genuine(
        node_id: DHTID | None, peer_id: PeerID, responded: bool = True
    ) -> None:
        known_id = node_id_of(peer_id)
        if node_id is None or node_id == known_id:
            await update_routing_table(known_id, peer_id, responded=responded)

    async def find_genuine(peer: PeerID, keys: Collection[DHTID]) -> dict[DHTID, Found] | None:
        found = await call_find(peer, keys)
        return found and {
            key: _genuine(*answer, max_neighbors=protocol.bucket_size)
            for key, answer in found.items()
        }

    def is_small_and_valid(key_bytes: bytes, dictionary: object) -> bool:
        is_small = isinstance(dictionary, DictionaryDHTValue) and len(dictionary) <= MAX_SUBKEYS
        return is_small and bool(is_dictionary_valid(key_bytes, dictionary))

    protocol.update_routing_table = update_if_genuine
    protocol.call_find = find_genuine
    protocol._validate_dictionary = is_small_and_valid


def _genuine(
    value: ValueWithExpiration | None, neighbors: dict[DHTID, PeerID], *, max_neighbors: int
) -> Found:
    """A node's answer to a search, without what it made up: (value, node ID -> peer ID)."""
    genuine = {n: p for n, p in neighbors.items() if n == node_id_of(p)}
    nearest = dict(list(genuine.items())[:max_neighbors])
    if value is None or not isinstance(value.value, DictionaryDHTValue):
        return None, nearest
    return _dictionary({k: (v, t) for k, (v, t) in value.value.data.items()}), nearest
