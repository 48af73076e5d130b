"""All versions of a run's manifest that a peer knows, and which of them is in force in a slot.

Each version names the one before by its digest, back to the first, whose digest is the run's name.
They are kept as blobs, so that others can have them; a file lists them.
"""

from pathlib import Path

from dht.errors import BadMessage
from dipaco.checkpoint import write_atomically
from dipaco.topology import ModuleID
from peer.manifest import Manifest, Origin, parse_manifest
from peer.store import BlobStore
from peer.succession import check_successor


class History:
    """The manifests of one run, in memory and on disk; versions are only ever added."""

    def __init__(self, first: Manifest, store: BlobStore, file: Path) -> None:
        self._store = store
        self._file = file
        self._versions = [first]
        self._origins: dict[ModuleID, Origin] = {}
        self._add_origins(first)
        store.add(first.to_bytes())
        self._read()

    @property
    def first(self) -> Manifest:
        """Version 1, whose digest is the run's name."""
        return self._versions[0]

    @property
    def newest(self) -> Manifest:
        """The latest version, in force or not yet; its levels hold all modules there are."""
        return self._versions[-1]

    @property
    def versions(self) -> tuple[Manifest, ...]:
        """All versions, the first one first."""
        return tuple(self._versions)

    def at(self, slot: int) -> Manifest:
        """The version in force in `slot`; before the run starts, that is the first one."""
        return next((m for m in reversed(self._versions) if m.first_slot <= slot), self.first)

    def round_end(self, module: ModuleID, slot: int) -> float:
        """When the round of `slot` ends for a module: Unix time, in seconds.

        At the end of the slot; or, staggered, at an even share of it for each level.
        """
        manifest = self.at(slot)
        num_levels = len(manifest.topology.levels)
        share = (module.level + 1) / num_levels if manifest.run_config.rounds.staggered else 1.0
        return self.first.slot_start(slot) + share * self.first.run_config.rounds.round_seconds

    def since(self, slot: int) -> tuple[Manifest, ...]:
        """The version in force in `slot`, and all later ones."""
        return self.versions[self.at(slot).version - 1 :]

    def get(self, digest: str) -> Manifest | None:
        """The version of that digest, or None if it is not known here."""
        return next((m for m in self._versions if m.digest == digest), None)

    def origin(self, module: ModuleID) -> Origin:
        """Where a module's log begins; LookupError if no version has that module."""
        return self._origins[module]

    def add(self, manifest: Manifest, *, sender: str) -> bool:
        """Take up a parsed manifest, on disk too; False if it is known already.

        Raises `BadMessage`, naming its sender, if it may not follow the newest one; naming the
        operator, if that signed another one in its place: then the first one seen is kept.
        """
        if self.get(manifest.digest) is not None:
            return False
        if manifest.peer == self.first.peer and manifest.version <= self.newest.version:
            raise BadMessage(manifest.peer, f"signed two manifests of version {manifest.version}")
        check_successor(manifest, self.newest, sender=sender)
        self._store.add(manifest.to_bytes())
        digests = [m.digest for m in (*self._versions, manifest)]
        write_atomically(self._file, "\n".join(digests).encode())
        self._take_up(manifest)
        return True

    def _take_up(self, manifest: Manifest) -> None:
        self._versions.append(manifest)
        self._add_origins(manifest)

    def _add_origins(self, manifest: Manifest) -> None:
        for birth in manifest.births:
            origin = Origin(version=birth.version, state=birth.state)
            self._origins[ModuleID.parse(birth.module)] = origin
        for module in manifest.topology.modules:
            # All modules of a level of the first version start equal (paper, Algorithm 1).
            start = Origin(version=0, state=manifest.starts[module.level])
            self._origins.setdefault(module, start)

    def _read(self) -> None:
        """Take up what the disk has; what is damaged is asked for again."""
        try:
            digests = self._file.read_text().split()
            for digest in digests[1:]:
                raw = self._store.read(digest)
                if raw is None:
                    return
                manifest = parse_manifest(raw, digest=digest, sender="disk")
                check_successor(manifest, self.newest, sender="disk")
                self._take_up(manifest)
        except (OSError, ValueError, BadMessage):
            return
