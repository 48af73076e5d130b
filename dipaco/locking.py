"""One process at a time in a directory, where two would write over each other's files."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dipaco.errors import ConfigError

LOCK_FILE = "lock"  # which a peer holds, too: no run is prepared while it is served


@contextmanager
def working_in(directory: Path) -> Iterator[None]:
    """Hold a directory, made if need be; the kernel lets go of it if this process is killed.

    ConfigError if another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK_FILE).open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ConfigError(
                    f"another process is at work in {directory}",
                    hint="wait until it has ended, or take another directory",
                ) from error
            raise ConfigError(
                f"cannot lock {directory}: {error.strerror}",
                hint="take a directory on a disk of this machine",
            ) from error
        yield
