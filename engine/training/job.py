"""How one of the processes of a job ends: in agreement with the others, and with one line from one of them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from engine.support.errors import Interrupted
from engine.training.ranks import Ranks
from engine.training.rendezvous import EndedElsewhere


@contextlib.contextmanager
def job() -> Iterator[Ranks]:
    """This process's place among those of a job. An error in one ends all, and one tells it; so does a signal, with its
    status, and rank 0 says where it stopped."""
    try:
        ranks = Ranks.join()
    except EndedElsewhere:
        sys.exit(2)
    try:
        yield ranks
    except EndedElsewhere:
        ranks.leave()
        sys.exit(2)
    except Interrupted as interruption:
        ranks.leave(interruption.status)
        if ranks.rank == 0:
            raise
        sys.exit(interruption.status)
    except BaseException as error:
        if ranks.fail():
            raise
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)
    else:
        ranks.leave()
    finally:
        ranks.close()
