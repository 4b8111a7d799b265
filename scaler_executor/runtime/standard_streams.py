"""A worker's descriptors 0 to 2, which calls may close and others count on."""

from __future__ import annotations

import os

from scaler_executor.runtime.platform import move_away


class StandardStreams:
    """Knows how to open them again."""

    def __init__(self) -> None:
        #: {1 or 2: a copy of it}. Input is nothing in any worker.
        self._copies: dict[int, int] = {}

    def keep(self) -> None:
        """Remember what they are now."""
        for fd in (1, 2):
            try:
                self._copies[fd] = move_away(os.dup(fd))
            except OSError:
                pass  # there is none

    def restore(self) -> None:
        """Open again what a call has closed, or the next file to be opened would get what others print. What it has
        redirected stays so."""
        try:
            for fd in (0, *self._copies):
                os.get_inheritable(fd)
        except OSError:
            pass
        else:
            return
        null = os.open(os.devnull, os.O_RDONLY)  # its number is the lowest that is free
        if null:
            os.close(null)
        for fd, copy in self._copies.items():
            try:
                os.get_inheritable(fd)
            except OSError:
                os.dup2(copy, fd)

    def let_go(self) -> None:
        """In a process that a call forked: whoever reads from them would wait for its end."""
        for copy in self._copies.values():
            try:
                os.close(copy)
            except OSError:
                pass
