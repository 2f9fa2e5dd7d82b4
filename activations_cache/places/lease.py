"""A lock on an object store, which has none: an object that says who holds it and for how long it stays silent.

The holder puts its name into the object under the condition that there is none, and puts it again, each time as a
new version, every third of `Lease.seconds`. Whoever wants it and has seen the same version for `seconds`, by
its own clock, takes it over, under the condition that it is still that version; at once if the holder ran on this
machine and that process has gone. So nobody compares clocks, and of several who take over one succeeds.

A holder that was only stopped for so long, or cut off, may wake up and go on writing. `check` tells it, but no lock
on another machine can prevent what is on its way already. Nothing therefore rests on the lock but that two
processes do not do the same work: see `Lock.final`.

References
----------
Kleppmann, "How to do distributed locking" (2016): why a lease alone does not protect what it guards.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from sae.errors import StoreError

from .base import LockedError

if TYPE_CHECKING:
    from .objects import ObjectPlace


class _Holder(NamedTuple):
    """Who holds a lock: nobody, where `owner` is empty."""

    owner: str
    host: str
    machine: str
    pid: int
    begun: str


class _Sight(NamedTuple):
    """Which version of a lock this process saw, and since when it has not changed."""

    version: Any
    since: float


class Lease:
    """An exclusive lock on an object store.

    Parameters
    ----------
    place
        The object; created if absent, never removed.
    wait
        Whether to wait for another holder instead of failing.

    Raises
    ------
    LockedError
        Somebody holds it and was heard of within `seconds`, or this process has not yet watched for so long.
    """

    final: ClassVar[bool] = False
    seconds: ClassVar[float] = 60.0
    """Silence after which a holder is taken for dead: long against a pause of a process or of a network."""

    _seen: ClassVar[dict[str, _Sight]] = {}

    def __init__(self, place: ObjectPlace, *, wait: bool = False) -> None:
        self._place = place
        self._holder = _Holder(
            uuid.uuid4().hex, socket.gethostname(), _machine(), os.getpid(), _begun("self")
        )
        self._beats = 0
        self._mutex = threading.Lock()
        self._version: Any = None
        while not self._take():
            if not wait:
                raise LockedError(
                    f"{place} is held by another process",
                    got=self._other(),
                    do=f"wait for it to end, or stop it; {self.seconds:.0f} s after its last sign of life "
                    "the same command takes over",
                )
            time.sleep(min(place.poll_seconds, self.seconds / 4))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="assay-lease", daemon=True)
        self._thread.start()

    @property
    def released(self) -> bool:
        """Whether it is no longer held."""
        return self._version is None

    def check(self) -> None:
        """Renew it.

        Raises
        ------
        LockedError
            Somebody else has taken it over.
        """
        if not self._beat():
            raise LockedError(
                f"{self._place} was taken over by another process",
                got=self._other(),
                do="start again; it continues after the last commit",
            )

    def release(self) -> None:
        """Let others have it; a second call does nothing."""
        if self.released:
            return
        self._stop.set()
        self._thread.join()
        with self._mutex:
            version, self._version = self._version, None
            # out of reach: others wait until the silence is long enough
            with suppress(StoreError):
                self._place.exchange(self._text(_Holder("", "", "", 0, "")), version)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _take(self) -> bool:
        """Try once to become the holder."""
        found = self._place.read_version()
        if found is not None and not self._is_free(found.data, found.token):
            return False
        self._version = self._place.exchange(self._text(self._holder), found.token if found else None)
        return self._version is not None

    def _is_free(self, data: bytes, version: Any) -> bool:
        holder = _read(data)
        if not holder.owner:
            return True
        if holder.machine and holder.machine == self._holder.machine:
            return _begun(str(holder.pid)) != holder.begun
        now = time.monotonic()
        sight = self._seen.get(str(self._place))
        if sight is None or sight.version != version:
            self._seen[str(self._place)] = _Sight(version, now)
            return False
        return now - sight.since > self.seconds

    def _renew(self) -> None:
        while not self._stop.wait(self.seconds / 3):
            try:
                if not self._beat():
                    return
            except StoreError:
                # the object store is out of reach for the moment; `check` says so where it matters
                continue

    def _beat(self) -> bool:
        """Put a new version; return False if the object is no longer this holder's."""
        with self._mutex:
            self._beats += 1
            version = self._place.exchange(self._text(self._holder), self._version)
            if version is None:
                # an answer may have been lost: the version is ours then, though not the one we know of
                found = self._place.read_version()
                if found is None or _read(found.data).owner != self._holder.owner:
                    return False
                version = found.token
            self._version = version
            return True

    def _text(self, holder: _Holder) -> bytes:
        return json.dumps({**holder._asdict(), "beats": self._beats, "token": uuid.uuid4().hex}).encode()

    def _other(self) -> str:
        found = self._place.read_version()
        holder = _read(found.data) if found else None
        return f"process {holder.pid} on {holder.host}" if holder and holder.owner else "somebody unknown"


def _read(data: bytes) -> _Holder:
    try:
        body = json.loads(data)
        return _Holder(*(body[name] for name in _Holder._fields))
    except (ValueError, KeyError, TypeError):
        # not a lock of ours: nobody who would renew it
        return _Holder("unknown", "", "", 0, "")


def _machine() -> str:
    """Return what tells this run of this machine from every other; empty where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def _begun(process: str) -> str:
    """Return when a process of this machine began, in ticks since the boot; empty if it runs no more."""
    try:
        after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    # a killed process whose parent has not asked after it keeps its entry
    return "" if after_name[0] in "ZX" else after_name[19]
