"""Values that signatures name. Apart from the modules that use them, which take long to import."""

from __future__ import annotations

from enum import Enum
from typing import Final

#: Seconds that `cancel()` waits for its confirmation unless told otherwise.
CANCEL_TIMEOUT_S: Final = 30.0
#: Seconds that a cancelled call has to unwind before its process is killed.
CANCEL_GRACE_S: Final = 1.0


class DefaultTimeout(Enum):
    """The type of `DEFAULT_TIMEOUT`."""

    DEFAULT = "the executor's cancel_timeout"

    def __repr__(self) -> str:
        return f"<{self.value}>"


DEFAULT_TIMEOUT: Final = DefaultTimeout.DEFAULT


class Unchanged(Enum):
    """The type of `UNCHANGED`."""

    UNCHANGED = "unchanged"

    def __repr__(self) -> str:
        return f"<{self.value}>"


#: Stands for an option that a view takes over from its executor.
UNCHANGED: Final = Unchanged.UNCHANGED

#: Seconds in which a served cluster has to let an executor in.
CONNECT_TIMEOUT_S: Final = 10.0
#: Environment variable that names the connection file of the cluster to use, or its address, tcp://HOST:PORT; in the
#: second case the other one names the connection file with the keys.
ADDRESS_VARIABLE: Final = "SCALER_EXECUTOR_ADDRESS"
CREDENTIALS_VARIABLE: Final = "SCALER_EXECUTOR_CREDENTIALS"
