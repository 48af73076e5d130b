"""One process at a time in a directory, where two would write over each other's files."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dipaco.errors import ConfigError

LOCK_FILE = "lock"


@contextmanager
def working_in(directory: Path, *, otherwise: str = "take another directory") -> Iterator[None]:
    """Hold a directory, made if need be; the kernel lets go of it if this process is killed.

    ConfigError if that cannot be, or another process holds it; `otherwise` is a way out.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / LOCK_FILE).open("wb")
    except OSError as error:
        raise ConfigError(
            f"cannot use the directory `{directory}`: {error.strerror}",
            hint=f"it must be yours to write; {otherwise}",
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                raise ConfigError(
                    f"another process is at work in `{directory}`",
                    hint=f"wait until it has ended, or {otherwise}",
                ) from error
            raise ConfigError(
                f"cannot lock the directory `{directory}`: {error.strerror}",
                hint=f"it must lie on a disk of this machine; {otherwise}",
            ) from error
        yield
