"""Ends a run that hangs, and says where each process was.

A process that waits in a collective for one that never comes cannot look after itself: its thread is in the depths of
a library. Other threads can. It works for whatever a process hangs in, and under every engine.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage] -- documented

from qa_dist.errors import listing

PACKAGE = str(Path(__file__).parent.parent)
POLL_SECONDS = 0.5
ANSWER_SECONDS = 2.0
"""How often a process looks whether another one has found a hang, and wants to know where it is."""
GATHERING_SECONDS = 8.0
"""How long the one that has found it waits for the others' answers."""
JOINING_SECONDS = 300.0
"""How long processes may take to find each other, if a step may take less."""
LAST_SECONDS = 30.0
"""After which it ends even if it could not say anything: what hangs may be the disk."""


@dataclass(frozen=True)
class Place:
    """Where a process was."""

    host: str
    where: str
    stack: str = ""


class Watchdog:
    """Watches one process's main thread. All processes have one, and tell each other through a store."""

    def __init__(self, rank: int, world_size: int, phase_seconds: float, step_seconds: float):
        """`phase_seconds`, `step_seconds`: what may take how long; see `phase` and `step`."""
        self.rank = rank
        self.world_size = world_size
        self.phase_seconds = phase_seconds
        self.step_seconds = step_seconds
        self._doing: tuple[str, float] | None = None
        """What, and how long it may take; another object for everything new."""
        self._ended = threading.Event()
        self._store: Store | None = None

    def talk_through(self, store: Store) -> None:
        """From now on the processes can tell each other where they are."""
        self._store = store
        threading.Thread(target=self._answer, args=(store,), name="watchdog answers", daemon=True).start()

    def joining(self) -> None:
        """From now on the process looks for the others, which have been started at the same time."""
        self._doing = "joining the other processes", min(max(self.step_seconds, JOINING_SECONDS), self.phase_seconds)

    def step(self, what: str) -> None:
        """From now on the main thread does `what`: a step, in which processes wait for each other all the time."""
        self._doing = what, self.step_seconds

    def phase(self, what: str) -> None:
        """From now on it does something that may take its time, such as to prepare the data."""
        self._doing = what, self.phase_seconds

    def rest(self) -> None:
        """From now on it does something that knows its own limits."""
        self._doing = None

    @contextlib.contextmanager
    def watching(self, on_hang: Callable[[str], object]) -> Iterator[None]:
        """Watch; `on_hang` is told the findings before the process ends with exit code 1, in the watching thread."""
        threading.Thread(target=self._watch, args=(on_hang,), name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            self._ended.set()
            self.rest()

    def _watch(self, on_hang: Callable[[str], object]) -> None:
        watched, taken, last = None, 0.0, time.monotonic()
        while not self._ended.wait(POLL_SECONDS):
            now, before = time.monotonic(), last
            last = now
            doing = self._doing
            if doing is not watched:
                watched, taken = doing, 0.0
                continue
            taken += min(now - before, 5 * POLL_SECONDS)  # a job that was suspended has not had the time in between
            if doing is not None and taken > doing[1]:
                timer = threading.Timer(LAST_SECONDS, os._exit, [1])
                timer.daemon = True
                timer.start()
                try:
                    self._tell(doing[0], taken, doing[1], on_hang)
                finally:
                    os._exit(1)

    def _answer(self, store: Store) -> None:
        """Once one process has found a hang, tell it where this one is, which may be right to be where it is."""
        with contextlib.suppress(RuntimeError):  # the store's process has gone
            while not self._ended.wait(ANSWER_SECONDS):
                if store.check(["hang"]):
                    store.set(f"hang/{self.rank}", json.dumps(asdict(place())))
                    return

    def _tell(self, what: str, seconds: float, limit: float, on_hang: Callable[[str], object]) -> None:
        places = {self.rank: place()}
        if self._store is not None:
            # In a thread of its own: if what hangs is the process that holds the store, it does not come back.
            gathering = threading.Thread(target=self._gather, args=(self._store, places), daemon=True)
            gathering.start()
            gathering.join(GATHERING_SECONDS + 2)
        groups = grouped(dict(places), self.world_size)
        settings = {self.step_seconds: "run.step_timeout_minutes", self.phase_seconds: "run.timeout_minutes"}
        allowed = f"{settings.get(limit, 'for this')}: {limit:g} s"
        odd = next(ranks for where, ranks, _ in groups if where)
        if self.rank == min(places):
            sys.stderr.write(f"rank {odd[0]} was here:\n{places[odd[0]].stack}")
            sys.stderr.flush()
        on_hang(f"no progress for {seconds:.0f} s in {what} ({allowed}). {described(groups)}")

    def _gather(self, store: Store, places: dict[int, Place]) -> None:
        """Every process's place; those that do not answer are left out."""
        end = time.monotonic() + GATHERING_SECONDS
        with contextlib.suppress(RuntimeError):  # the store's process is gone, or hangs itself
            store.set(f"hang/{self.rank}", json.dumps(asdict(places[self.rank])))
            store.set("hang", "yes")
            while len(places) < self.world_size and time.monotonic() < end:
                for rank in range(self.world_size):
                    if rank not in places and store.check([f"hang/{rank}"]):
                        places[rank] = Place(**json.loads(store.get(f"hang/{rank}")))
                time.sleep(POLL_SECONDS)
            time.sleep(2 * POLL_SECONDS)  # the store goes with its process, and others may still be reading


def place() -> Place:
    """Where the main thread is: the innermost place in this package, and the function in which that has come to be.
    Where it waits for the next batch, the thread that makes it."""
    stack = _stack(threading.main_thread())
    own = [i for i, entry in enumerate(stack) if entry.filename.startswith(PACKAGE)]
    if own and stack[own[-1]].filename.endswith("prefetch.py"):
        thread = next((t for t in threading.enumerate() if t.name.startswith("prefetch")), threading.main_thread())
        stack = _stack(thread)
        own = [i for i, entry in enumerate(stack) if entry.filename.startswith(PACKAGE)]
    text = "".join(stack.format())
    if not own:
        return Place(socket.gethostname(), "in no code of qa_dist", text)
    entry = stack[own[-1]]
    called = f" in {stack[-1].name}," if own[-1] + 1 < len(stack) else ""
    where = f"{called} {Path(entry.filename).name}:{entry.lineno} ({entry.name})".strip()
    return Place(socket.gethostname(), where, text)


def _stack(thread: threading.Thread) -> traceback.StackSummary:
    frame = sys._current_frames().get(thread.ident or 0)
    return traceback.extract_stack(frame) if frame else traceback.StackSummary()


def grouped(places: Mapping[int, Place], world_size: int) -> list[tuple[str, list[int], list[str]]]:
    """Place, ranks and hosts; the fewest ranks first, and before them those that have not answered (place "")."""
    groups: dict[str, tuple[list[int], list[str]]] = {}
    for rank, one in sorted(places.items()):
        ranks, hosts = groups.setdefault(one.where, ([], []))
        ranks.append(rank)
        if one.host not in hosts:
            hosts.append(one.host)
    found = sorted(((where, *members) for where, members in groups.items()), key=lambda group: len(group[1]))
    silent = [rank for rank in range(world_size) if rank not in places]
    return [("", silent, []), *found] if silent else found


def described(groups: list[tuple[str, list[int], list[str]]]) -> str:
    """`groups` as a sentence each."""
    texts = []
    for where, ranks, hosts in groups:
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {listing(ranks, 8)}"
        if where:
            texts.append(f"{who} ({listing(hosts, 3)}) {'was' if len(ranks) == 1 else 'were'} {where}.")
        else:
            texts.append(f"{who} did not answer: stopped, or the machine or its network is gone.")
    return " ".join(texts)
