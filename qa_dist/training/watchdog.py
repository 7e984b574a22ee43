"""Ends a run that hangs, and says where each process was.

A process that waits in a collective for one that never comes cannot look after itself: its thread is in the depths of
a library. A second thread can. It works for whatever a process hangs in, and under every engine.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage] -- documented

from qa_dist.errors import listing

PACKAGE = str(Path(__file__).parent.parent)
POLL_SECONDS = 0.5
GATHERING_SECONDS = 8.0
"""How long the processes wait for each other's word before they end."""
LAST_SECONDS = 30.0
"""After which a process ends even if it could not say anything: what hangs may be the disk, or the store."""


class Watchdog:
    """Watches one process's main thread. All processes have one, and tell each other through a store."""

    def __init__(self, rank: int, world_size: int, phase_seconds: float, step_seconds: float):
        """`phase_seconds`, `step_seconds`: what may take how long; see `phase` and `step`."""
        self.rank = rank
        self.world_size = world_size
        self.phase_seconds = phase_seconds
        self.step_seconds = step_seconds
        self._doing: tuple[str, float, float] | None = None
        """What, since when and how long at most."""
        self._ended = threading.Event()

    def step(self, what: str) -> None:
        """From now on the main thread does `what`: a step, in which processes wait for each other all the time."""
        self._doing = what, time.monotonic(), self.step_seconds

    def phase(self, what: str) -> None:
        """From now on it does something that may take its time, such as to prepare the data."""
        self._doing = what, time.monotonic(), self.phase_seconds

    def rest(self) -> None:
        """From now on it does something that knows its own limits."""
        self._doing = None

    @contextlib.contextmanager
    def watching(self, store: Store | None, on_hang: Callable[[str], object]) -> Iterator[None]:
        """Watch; `on_hang` is told the findings before the process ends with exit code 1, in the watching thread."""
        self.phase("the start")
        thread = threading.Thread(target=self._watch, args=(store, on_hang), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            self.rest()

    def _watch(self, store: Store | None, on_hang: Callable[[str], object]) -> None:
        while not self._ended.wait(POLL_SECONDS):
            doing = self._doing
            if doing is not None and time.monotonic() - doing[1] > doing[2] and doing is self._doing:
                last = threading.Timer(LAST_SECONDS, os._exit, [1])
                last.daemon = True
                last.start()
                try:
                    self._tell(*doing, store, on_hang)
                finally:
                    os._exit(1)

    def _tell(
        self, what: str, since: float, limit: float, store: Store | None, on_hang: Callable[[str], object]
    ) -> None:
        own = (socket.gethostname(), position())
        places = {self.rank: own} if store is None else self._gathered(store, own)
        seconds = time.monotonic() - since
        setting = "run.step_timeout_minutes" if limit == self.step_seconds else "run.timeout_minutes"
        groups = grouped(places, self.world_size)
        if self.rank in groups[0][1]:  # those that are elsewhere than most
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        on_hang(f"no progress for {seconds:.0f} s in {what}; {setting} allows {limit:.0f} s. {described(groups)}")

    def _gathered(self, store: Store, own: tuple[str, str]) -> dict[int, tuple[str, str]]:
        """Every process's host and place; those that do not answer are left out."""
        places = {self.rank: own}
        end = time.monotonic() + GATHERING_SECONDS
        try:
            store.set(f"hang/{self.rank}", json.dumps(own))
            while len(places) < self.world_size and time.monotonic() < end:
                for rank in range(self.world_size):
                    if rank not in places and store.check([f"hang/{rank}"]):
                        host, place = json.loads(store.get(f"hang/{rank}"))
                        places[rank] = (host, place)
                time.sleep(POLL_SECONDS)
            time.sleep(2 * POLL_SECONDS)  # the store goes with its process, and others may still be reading
        except RuntimeError:
            pass  # the store's process is gone, or hangs itself
        return places


def position() -> str:
    """Where the main thread is: the innermost place in this package, and the function in which that has come to be."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = traceback.extract_stack(frame) if frame else []
    own = [i for i, entry in enumerate(stack) if entry.filename.startswith(PACKAGE)]
    if not own:
        return "in no code of qa_dist"
    place = stack[own[-1]]
    called = f" in {stack[-1].name}," if own[-1] + 1 < len(stack) else ""
    return f"{called} {Path(place.filename).name}:{place.lineno} ({place.name})".strip()


def grouped(places: Mapping[int, tuple[str, str]], world_size: int) -> list[tuple[str, list[int], list[str]]]:
    """Place, ranks and hosts; the fewest ranks first, and before them those that have not answered (place "")."""
    groups: dict[str, tuple[list[int], list[str]]] = {}
    for rank, (host, place) in sorted(places.items()):
        ranks, hosts = groups.setdefault(place, ([], []))
        ranks.append(rank)
        if host not in hosts:
            hosts.append(host)
    found = sorted(((place, *members) for place, members in groups.items()), key=lambda group: len(group[1]))
    silent = [rank for rank in range(world_size) if rank not in places]
    return [("", silent, []), *found] if silent else found


def described(groups: list[tuple[str, list[int], list[str]]]) -> str:
    """`groups` as a sentence each."""
    texts = []
    for place, ranks, hosts in groups:
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {listing(ranks, 8)}"
        if place:
            texts.append(f"{who} ({listing(hosts, 3)}) {'was' if len(ranks) == 1 else 'were'} {place}.")
        else:
            texts.append(f"{who} did not answer: stopped, or the machine or its network is gone.")
    return " ".join(texts)
