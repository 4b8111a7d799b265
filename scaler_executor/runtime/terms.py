"""What holds for the calls that are submitted through one executor, or one view of it.

Functions are registered with their options, so that a call itself carries none. This module knows options and which
functions have been registered with them. It sends nothing.
"""

from __future__ import annotations

import weakref
from typing import Any, Final

from scaler_executor.protocol.messages import Options

NO_OPTIONS: Final = Options()


class KnownCalls(dict[int, Any]):
    """{id(function): KnownFunction} of what is called with the same options, under the same name."""


class Terms:
    """The options of an executor or a view.

    Args:
        options: What they are.
        name: What its calls are called; None: by their functions.
        parent: Of a view: the view or executor that it is of.
    """

    __slots__ = ("calls", "is_closed", "name", "options", "parent")

    def __init__(self, options: Options, name: str | None = None, parent: Terms | None = None) -> None:
        self.options = options
        self.name = name
        self.parent = parent
        #: The same object for all terms that are alike. Shared out by `TermsTable`.
        self.calls = KnownCalls()
        #: The view takes no more calls.
        self.is_closed = False

    @property
    def are_special(self) -> bool:
        """Whether a call has to carry them."""
        return self.name is not None or self.options != NO_OPTIONS

    @property
    def are_closed(self) -> bool:
        """Whether the view, or one that it is a view of, takes no more calls."""
        terms: Terms | None = self
        while terms is not None:  # no recursion: views of views may be many
            if terms.is_closed:
                return True
            terms = terms.parent
        return False

    def are_within(self, other: Terms) -> bool:
        """Tell whether these are `other`, or those of a view of it."""
        terms: Terms | None = self
        while terms is not None and terms is not other:
            terms = terms.parent
        return terms is other


class TermsTable:
    """Knows which terms are alike: a view that is made for a single call costs no registration, but for the first."""

    def __init__(self) -> None:
        self._known: weakref.WeakValueDictionary[Any, KnownCalls] = weakref.WeakValueDictionary()

    def make(self, options: Options, name: str | None = None, parent: Terms | None = None) -> Terms:
        """Return new terms. Thread-safe: the caller holds the client's lock."""
        terms = Terms(options, name, parent)
        terms.calls = self._known.setdefault((options, name), terms.calls)
        return terms
