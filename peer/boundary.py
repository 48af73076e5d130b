"""The boundary of a task: what goes wrong inside is logged, and ends no more than that."""

import logging
from collections.abc import Coroutine

from dht.errors import SwarmError
from dipaco.errors import DipacoError
from peer.events import EventLog

log = logging.getLogger(__name__)


async def guarded(
    coroutine: Coroutine[object, object, object], where: str, events: EventLog
) -> None:
    """Run it to its end, well or not; only being cancelled gets out."""
    try:
        await coroutine
    except (SwarmError, DipacoError, OSError) as error:
        events.write("error", where=where, why=str(error))
    except Exception as error:
        log.exception("unexpected error in %s", where)
        events.write("error", where=where, why=repr(error))
