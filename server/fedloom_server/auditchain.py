"""The audit log's hash chain, as pure rules: what an entry's hash covers, and where a chain is broken.

Nobody needs fedloom to check it: an entry's hash is the SHA-256 of the UTF-8 text of the JSON array
``[seq, at, actor, action, subject, details, previous]``, without spaces and without escapes beyond
JSON's own, where ``details`` is a string that holds JSON and ``previous`` is the hash before.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

NOTHING_BEFORE = "0" * 64


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the audit log."""

    seq: int
    """From 1, without gaps."""
    at: str
    """When it was written, as ISO 8601 in UTC."""
    actor: str
    """Role and name: who did it."""
    action: str
    subject: str
    """What it was done to."""
    details: str
    """JSON."""
    previous: str
    hash: str


@dataclass(frozen=True)
class Head:
    """The end of a chain; who keeps one outside the coordinator notices when later entries are cut off."""

    seq: int = 0
    hash: str = NOTHING_BEFORE

    def __str__(self) -> str:
        return f"{self.seq} {self.hash}"


def hash_of(*, seq: int, at: str, actor: str, action: str, subject: str, details: str, previous: str) -> str:
    """The hash of an entry, over all that it says and the hash before."""
    content = [seq, at, actor, action, subject, details, previous]
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Verification:
    """Follows a chain from its first entry and stops believing it at the first that is wrong."""

    def __init__(self, saved: Head | None = None) -> None:
        """``saved`` is a head that was noted earlier: the chain must still contain it."""
        self._saved = saved
        self.head = Head()
        """The last entry that is right."""
        self.fault = ""
        """What is wrong with the entry after it; empty while nothing is."""

    def follow(self, entries: Iterable[Entry]) -> None:
        """Take the next entries of the chain."""
        for entry in entries:
            if self.fault:
                return
            self.fault = self._fault_of(entry)
            if not self.fault:
                self.head = Head(entry.seq, entry.hash)

    def end(self) -> None:
        """Say that no entry follows: what was noted must have come by now."""
        if not self.fault and self._saved is not None and self._saved.seq > self.head.seq:
            self.fault = (
                f"the chain ends at entry {self.head.seq}, but entry {self._saved.seq} was there when its "
                f"head was noted: entries {self.head.seq + 1} to {self._saved.seq} have been removed"
            )

    def _fault_of(self, entry: Entry) -> str:
        wanted = self.head.seq + 1
        if entry.seq != wanted:
            return f"entry {wanted} is missing or out of order: entry {entry.seq} came in its place"
        if entry.previous != self.head.hash:
            return f"entry {entry.seq} does not follow the one before: one of them has been replaced"
        if entry.hash != _hash_again(entry):
            return f"entry {entry.seq} has been changed: its hash is not that of its content"
        if self._saved is not None and entry.seq == self._saved.seq and entry.hash != self._saved.hash:
            return f"entry {entry.seq} is not the one whose head was noted: the chain has been written anew"
        return ""


def _hash_again(entry: Entry) -> str:
    return hash_of(
        seq=entry.seq, at=entry.at, actor=entry.actor, action=entry.action, subject=entry.subject,
        details=entry.details, previous=entry.previous,
    )  # fmt: skip
