from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dht.storage import ENTRY_BYTES, RecordStorage
from dht.swarm import MAX_SUBKEYS

KEYS, SUBKEYS = [b"a", b"b"], ["x", "y", "z"]


class StorageMachine(RuleBasedStateMachine):
    """Compares `RecordStorage` with the plainest thing that keeps its promise."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.storage = RecordStorage(lambda: self.now)
        self.model: dict[tuple[bytes, str], tuple[bytes, float]] = {}

    @rule(
        key=st.sampled_from(KEYS),
        subkey=st.sampled_from(SUBKEYS),
        value=st.binary(max_size=3),
        lifetime=st.integers(-1, 20),
    )
    def store(self, key: bytes, subkey: str, value: bytes, lifetime: int) -> None:
        entry = (value, self.now + lifetime)
        old = self.model.get((key, subkey))
        is_newer = lifetime > 0 and (old is None or entry[1] > old[1])
        if is_newer:
            self.model[key, subkey] = entry
        is_stored = self.storage.store(key, subkey, *entry)
        assert is_stored == (is_newer or (lifetime > 0 and entry == old))

    @rule(seconds=st.integers(0, 10))
    def wait(self, seconds: int) -> None:
        self.now += seconds
        self.model = {k: entry for k, entry in self.model.items() if entry[1] > self.now}

    @invariant()
    def holds_what_was_accepted_until_it_expires(self) -> None:
        for key in KEYS:
            expected = {s: entry for (k, s), entry in self.model.items() if k == key}
            assert self.storage.get(key) == expected
        assert set(self.storage.keys()) == {key for key, _ in self.model}
        assert self.storage.num_entries == len(self.model)
        assert self.storage.num_bytes == sum(ENTRY_BYTES + len(v) for v, _ in self.model.values())


TestStorage = StorageMachine.TestCase
TestStorage.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_key_holds_a_bounded_number_of_peers() -> None:
    storage = RecordStorage(lambda: 0.0)
    assert all(storage.store(b"k", str(i), b"v", 10) for i in range(MAX_SUBKEYS))
    assert not storage.store(b"k", "one more", b"v", 10)
    assert storage.store(b"k", "0", b"w", 11), "who is there may renew"
    assert storage.store(b"other", "one more", b"v", 10)


def test_a_peer_and_all_peers_have_a_bounded_number_of_bytes() -> None:
    size = ENTRY_BYTES + 1
    storage = RecordStorage(lambda: 0.0, max_bytes=5 * size, max_peer_bytes=3 * size)
    taken = [storage.store(bytes([i]), peer, b"v", 10) for peer in "ab" for i in range(4)]
    assert taken == [True, True, True, False, True, True, False, False]
    assert storage.num_bytes == 5 * size


def test_a_renewal_that_does_not_fit_leaves_the_record() -> None:
    storage = RecordStorage(lambda: 0.0, max_bytes=ENTRY_BYTES + 2)
    assert storage.store(b"k", "s", b"v", 10)
    assert not storage.store(b"k", "s", b"vvv", 11)
    assert storage.get(b"k") == {"s": (b"v", 10)}


def test_renewals_do_not_pile_up() -> None:
    storage = RecordStorage(lambda: 0.0)
    for expiration_time in range(1, 5000):
        assert storage.store(b"k", "s", b"v", expiration_time)
    assert len(storage._expirations) <= 1024 + 2 + 1
