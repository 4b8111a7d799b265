"""`__main__` in a worker: takes the definitions that came from the client, each version once.

This module knows what the worker has and what it still has to take. What a definition is made of, and when a new one is
due, the client knows; see `namespace` for the whole.
"""

from __future__ import annotations

import io
import pickle
from typing import Any, Final

from scaler_executor.protocol.messages import Frames, Payload
from scaler_executor.runtime.namespace_making import Unsendable
from scaler_executor.runtime.namespace_names import find_in, main_dict
from scaler_executor.runtime.segments import mapped

_ABSENT: Final = object()


class WorkerMain:
    """`__main__` in a worker.

    Args:
        inherited: See `snapshot`; None where nothing was.
    """

    def __init__(self, inherited: dict[str, Any] | None) -> None:
        self._inherited = inherited or {}
        #: {name: version} of what was taken.
        self._versions: dict[str, int] = {}
        #: {name: (version, payload)} of what is to be taken before the next call.
        self.pending: dict[str, tuple[int, Payload]] = {}
        #: {name: (version, payload, what it was bound to)} of what is being taken; None for the second time.
        self._taking: dict[str, tuple[int, Payload, Any] | None] = {}
        #: {name: why it is not there}
        self._missing: dict[str, str] = {}
        #: {class name: its attributes as they came}
        self._attributes: dict[str, dict[str, Any]] = {}

    def put(self, name: str, version: int, payload: Payload) -> None:
        """Note a definition, if it is newer than what is here."""
        if version > self._versions.get(name, 0) and version > self.pending.get(name, (0,))[0]:
            self.pending[name] = (version, payload)

    def apply(self) -> None:
        """Take what is pending. A definition that cannot be unpickled is missing, for whoever uses it.

        Raises:
            KeyboardInterrupt: The call was interrupted.
        """
        while self.pending:
            self.resolve(next(iter(self.pending)))

    def resolve(self, name: str) -> None:
        """Take one definition."""
        version, payload = self.pending.pop(name)
        main = main_dict()
        before = main.get(name, _ABSENT)
        if (
            before is not _ABSENT
            and name not in self._versions
            and name not in self._inherited
            and not name.startswith("__")
        ):
            self._versions[name] = version
            return  # a call has set it here, by a way that we do not see
        self._missing.pop(name, None)
        set_here = self._attributes_set_here(name, before)
        self._taking[name] = None if name in self._taking else (version, payload, before)
        try:
            value = _DefinitionUnpickler(self, payload, name, version).load()
        except KeyboardInterrupt:
            self.pending[name] = (version, payload)
            raise
        except _TakenMeanwhile:
            return
        except BaseException as error:
            value = Unsendable(f"it cannot be unpickled here: {type(error).__name__}: {error}")
        finally:
            self._taking.pop(name, None)
        self._versions[name] = version
        if type(value) is Unsendable:
            self._missing[name] = value.reason
            main.pop(name, None)
            return
        main[name] = value
        if isinstance(value, type):
            if value is before:
                for attribute, content in set_here.items():
                    setattr(value, attribute, content)
            self._attributes[name] = dict(value.__dict__)

    def resolve_needed(self, name: str) -> None:
        """Take a definition that another one names, if it is not there yet."""
        taking = self._taking.get(name)
        if taking is not None:
            # Each needs the other, as a class and its base that lists its subclasses. The base is bound by now, without
            # the list, and the class can be made of it; the first attempt, which waits for the base, is given up.
            version, payload, before = taking
            if main_dict().get(name, _ABSENT) is before and not self.has_taken(name, version):
                self.pending[name] = (version, payload)
        if name in self.pending:
            self.resolve(name)

    def has_inherited(self, name: str) -> bool:
        """Tell whether a name is there in every worker, as it was when the program began to make calls."""
        return name in self._inherited and name not in self._versions

    def version_of(self, name: str) -> int:
        """Return the version in which a name came from the client, 0 if it has not."""
        return self._versions.get(name, 0)

    def has_taken(self, name: str, version: int) -> bool:
        """Tell whether a definition is here, or a newer one."""
        return self._versions.get(name, 0) >= version

    def find(self, value: Any) -> str | None:
        """As `Names.find`: what came from the client, or was inherited, and is still bound to its name."""
        main = main_dict()
        name = find_in(main, value)
        if name is None or name in self._versions:
            return name
        return name if self._inherited.get(name, _ABSENT) is main.get(name) else None

    def explain(self, error: BaseException) -> str | None:
        """Return why a name is not there on which a call failed, None if it is not about one."""
        if not self._missing or not isinstance(error, (NameError, AttributeError)):
            return None
        name = getattr(error, "name", None)
        if name not in self._missing:
            text = str(error)
            name = next((missing for missing in self._missing if f"'{missing}'" in text), None)
        if name is None:
            return None
        return f"'{name}' of the program's __main__ could not be sent to the worker: {self._missing[name]}"

    def _attributes_set_here(self, name: str, value: Any) -> dict[str, Any]:
        """Return the attributes of a class that calls have set since it came."""
        came = self._attributes.get(name)
        if came is None or not isinstance(value, type):
            return {}
        return {key: content for key, content in value.__dict__.items() if key in came and came[key] is not content}


class _TakenMeanwhile(Exception):
    """Ends the unpickling of a definition that was taken while it waited for another one."""


class _DefinitionUnpickler(pickle.Unpickler):
    """Resolves pending names where it comes to them, so that their order does not matter."""

    def __init__(self, main: WorkerMain, payload: Payload, name: str, version: int) -> None:
        data, *buffers = mapped(payload.buffers) if isinstance(payload, Frames) else [payload]
        super().__init__(io.BytesIO(data), buffers=buffers)
        self._main = main
        self._name = name
        self._version = version

    def find_class(self, module: str, name: str) -> Any:
        """As pickle.Unpickler."""
        if module == "__main__":
            self._main.resolve_needed(name.partition(".")[0])
            if self._main.has_taken(self._name, self._version):
                raise _TakenMeanwhile
        return super().find_class(module, name)
