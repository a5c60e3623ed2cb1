"""A notice board that the ranks share beside their collectives: small texts under names, also when a rank hangs in one.

It is a client of its own on the store that the ranks met at, so that waiting for an answer never blocks torch's own client.
"""

import os
from typing import Any

import torch.distributed as dist

from moexpand.base.errors import EnvironmentFailure


class Board:
    """Texts by name, shared by the ranks of one attempt."""

    def __init__(self, attempt: str, timeout_seconds: float = 30.0) -> None:
        import datetime

        try:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            timeout = datetime.timedelta(seconds=timeout_seconds)
            store: Any = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
        except KeyError:  # a world of one rank, without torchrun
            store = dist.HashStore()
        except (dist.DistError, RuntimeError) as error:
            raise EnvironmentFailure(f"The store of the ranks does not answer: {str(error).splitlines()[0]}") from error
        self._store = dist.PrefixStore(f"moexpand {attempt}", store)

    def write(self, name: str, text: str) -> None:
        self._store.set(name, text)

    def read(self, name: str) -> str | None:
        """None where nobody wrote."""
        return self._store.get(name).decode() if self._store.check([name]) else None

    def first(self, name: str) -> bool:
        """Whether this call is the first of all ranks for `name`."""
        return self._store.add(name, 1) == 1
