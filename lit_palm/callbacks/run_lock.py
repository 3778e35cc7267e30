"""One run a folder: two that write checkpoints to the same place would delete each other's.

The lock is a small file with host, process and the time it was taken. It is free again when the run ends, when its
process is dead (on the same host), or when nothing has renewed it for some time (on another host).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from datetime import UTC, datetime
from typing import Any

from lit_palm.modules.storage import Place

__all__ = ["LOCK", "RunLock"]

LOCK = ".lock"
"""Name of the lock."""
RENEWED_EVERY = 30.0
"""Seconds between two renewals on a disk; behind a URL, where each is a request, four times as many."""
STALE_AFTER = 600.0
"""Seconds without a renewal after which the lock of another host counts for nothing."""

_HELD: set[str] = set()  # what this process holds


class RunLock:
    """Held from `take` to `release`, by one process."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._token = uuid.uuid4().hex
        self._started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        self._stop = threading.Event()
        self._renewer: threading.Thread | None = None

    def take(self) -> None:
        """Take the lock, which also shows that the place can be written to.

        Raises:
            ValueError: the place cannot be written to, or another run holds it; says which, and the way out.
        """
        folder = self._place.folder
        try:
            self._place.make()
            holder = self._claim()
        except ValueError:
            raise
        except Exception as error:  # every library below fsspec has errors of its own
            why = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise ValueError(
                f"checkpoints cannot be written to {folder}: {why}. Check the place, its permissions and the network, "
                "or name another `dirpath`"
            ) from error
        if holder is not None:
            raise ValueError(
                f"{folder}: process {holder['pid']} on {holder['host']} has been writing its checkpoints here since "
                f"{holder['started']}. Give this run a `dirpath` of its own, or end that one first; if it is gone for "
                f"good, delete {self._place.path(LOCK)}"
            )
        _HELD.add(self._token)
        self._stop.clear()
        self._renewer = threading.Thread(target=self._renew, name="lit_palm-lock", daemon=True)
        self._renewer.start()

    def release(self) -> None:
        """Give the place free; of a lock that another run has taken over, nothing is touched."""
        if self._renewer is None:
            return
        self._stop.set()
        self._renewer.join(timeout=5)
        _HELD.discard(self._token)
        self._renewer = None
        with contextlib.suppress(Exception):
            if (self._read() or {}).get("token") == self._token:
                self._place.remove(LOCK)

    def _claim(self) -> dict[str, Any] | None:
        """Become the holder, or say who is."""
        for _ in range(3):
            holder = self._holder()
            if holder is not None:
                return holder
            if not self._place.local:
                self._write()
                time.sleep(0.1)  # of two that came at once, the later one stays
                return self._holder()
            if self._create():
                return None
        raise OSError(f"{self._place.path(LOCK)} comes and goes")

    def _create(self) -> bool:
        """Write the lock on a disk; False when somebody else was faster."""
        lock = self._place.path(LOCK)
        old, new = f"{lock}.{self._token}.old", f"{lock}.{self._token}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(lock, old)
            if self._holder_in(old) is not None:  # not the stale one that was looked at, but that of a quicker run
                os.rename(old, lock)
                return False
            os.unlink(old)
        with open(new, "w", encoding="utf-8") as file:
            file.write(self._text())
        try:
            os.link(new, lock)
        except FileExistsError:
            return False
        except OSError:  # a filesystem without hard links
            os.replace(new, lock)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new)
        return True

    def _holder_in(self, path: str) -> dict[str, Any] | None:
        with open(path, "rb") as file:
            return self._judge(_parse(file.read()))

    def _holder(self) -> dict[str, Any] | None:
        """Who else holds the lock."""
        return self._judge(self._read())

    def _judge(self, found: dict[str, Any] | None) -> dict[str, Any] | None:
        if found is None or found.get("token") == self._token:
            return None
        if found.get("token") in _HELD:  # by another Trainer of this process
            return found
        if found.get("host") == socket.gethostname():
            return found if _is_running(int(found["pid"]), found.get("born")) else None
        return found if time.time() - float(found.get("renewed", 0)) < STALE_AFTER else None

    def _read(self) -> dict[str, Any] | None:
        try:
            return _parse(self._place.read(LOCK))
        except FileNotFoundError:
            return None

    def _write(self) -> None:
        self._place.write(LOCK, self._text().encode())

    def _text(self) -> str:
        own = {
            "host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid()), "started": self._started,
            "token": self._token, "renewed": time.time(),
        }  # fmt: skip
        return json.dumps(own)

    def _renew(self) -> None:
        while not self._stop.wait(RENEWED_EVERY * (1 if self._place.local else 4)):
            with contextlib.suppress(Exception):  # a lost renewal is made up for by the next
                if (self._read() or {"token": self._token}).get("token") == self._token:
                    self._write()


def _parse(data: bytes) -> dict[str, Any] | None:
    """What a lock says; None where it is none."""
    try:
        found = json.loads(data)
    except ValueError:
        return None
    return found if isinstance(found, dict) and {"host", "pid", "started"} <= found.keys() else None


def _is_running(pid: int, born: str | None) -> bool:
    """Whether a process of this host is alive, and the one that was meant: numbers are given again."""
    if pid == os.getpid():
        # a run that this process began and never ended, or one of a container that was started anew
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it belongs to somebody else
    now = _born(pid)
    return now != "dead" and (born is None or now is None or born == now)


def _born(pid: int) -> str | None:
    """What tells a process from an earlier one of the same number; None where the system does not say."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except FileNotFoundError:
        return "dead" if os.path.isdir("/proc/self") else None
    except OSError:
        return None
    return "dead" if fields[0] in "ZX" else fields[19]  # a zombie waits to be noticed; the time it was started
