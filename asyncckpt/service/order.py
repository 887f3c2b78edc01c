"""The order of commits: in one directory they happen as they were submitted, however many workers write. No torch."""

from __future__ import annotations

import threading
from collections import deque


class CommitOrder:
    """Hands out turns. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._lines: dict[str, deque[Turn]] = {}

    def enter(self, directory: str) -> Turn:
        """Join the end of the directory's line."""
        turn = Turn(self, directory)
        with self._changed:
            self._lines.setdefault(directory, deque()).append(turn)
        return turn

    def wait(self, turn: Turn) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._lines[turn.directory][0] is turn)

    def leave(self, turn: Turn) -> None:
        with self._changed:
            line = self._lines[turn.directory]
            line.remove(turn)
            if not line:
                del self._lines[turn.directory]
            self._changed.notify_all()


class Turn:
    """One save's place in line."""

    def __init__(self, order: CommitOrder, directory: str) -> None:
        self.directory = directory
        self._order = order

    def wait(self) -> None:
        """Block until everyone before has left. Call `leave` afterwards, whatever happens."""
        self._order.wait(self)

    def leave(self) -> None:
        """Let the next one commit."""
        self._order.leave(self)
