"""Ends a run that hangs, and reports where each process was.

A process that waits in a collective for another one cannot look after itself, since its main thread is inside a
library. Its other threads can. There are two kinds of hang, and both are found under every strategy:

- The main thread makes no progress: each thing that it does has a limit (`step`, `phase`).
- A whole process is frozen, or its machine is gone: every process counts up a number in a shared store every two
  seconds, and reads that of the next rank, so that the cost for a process does not grow with their number.
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
TALK_SECONDS = 2.0
"""How often a process gives a sign of life, and looks for that of the next rank and for a hang that was found."""
SHORTEST_SILENCE = 15.0
"""A process that gives no sign of life for less than this is never taken to be frozen: it may be busy, or swapping."""
GATHERING_SECONDS = 8.0
"""How long the process that found a hang waits for the others' answers."""
JOINING_SECONDS = 300.0
"""How long processes may take to find each other, if a step may take less."""
LAST_SECONDS = 30.0
"""When the process ends even if it could not report anything: what hangs may be the disk."""
LEFT = 2**40
"""Added to a rank's signs of life when it ends: its silence means nothing from then on."""


@dataclass(frozen=True)
class Place:
    """Where a process was."""

    host: str
    where: str
    stack: str = ""


class Watchdog:
    """Watches one process's main thread and the next rank. All processes have one; they communicate by a store."""

    def __init__(self, rank: int, world_size: int, phase_seconds: float, step_seconds: float):
        """`phase_seconds`, `step_seconds`: how long what may take; see `phase` and `step`."""
        self.rank = rank
        self.world_size = world_size
        self.phase_seconds = phase_seconds
        self.step_seconds = step_seconds
        self._doing: tuple[str, float] | None = None
        """What, and how long it may take; another object for everything new."""
        self._done: set[str] = set()
        """Kinds of steps of which there was one."""
        self._ended = threading.Event()
        self._store: Store | None = None
        self._talker: threading.Thread | None = None
        self._awaited: int | None = None
        """The rank whose sign of life is awaited; None if there is none."""
        self._signs = 0
        """How many there were; anything new counts."""

    def talk_through(self, store: Store) -> None:
        """Communicate with the other processes through `store` from now on; all of them do."""
        self._store = store
        self._awaited = 0
        self._talker = threading.Thread(target=self._talk, args=(store,), name="watchdog talks", daemon=True)
        self._talker.start()

    def joining(self) -> None:
        """From now on the process looks for the others, which have been started at the same time."""
        self._doing = "joining the other processes", min(max(self.step_seconds, JOINING_SECONDS), self.phase_seconds)

    def step(self, what: str, kind: str, *like: str) -> None:
        """From now on the main thread does `what`, in which processes wait for each other all the time.

        The first step of its `kind` may take as long as a phase, since kernels are chosen or compiled in it, unless
        there was one of a kind that is `like` it.
        """
        is_first = self._done.isdisjoint((kind, *like))
        self._done.add(kind)
        self._doing = what, self.phase_seconds if is_first else self.step_seconds

    def phase(self, what: str) -> None:
        """From now on it does something that may take its time, such as to prepare the data or to wait for the disk."""
        self._doing = what, self.phase_seconds

    def rest(self) -> None:
        """From now on it does something that has limits of its own."""
        self._doing = None

    @contextlib.contextmanager
    def watching(self, on_hang: Callable[[str], object]) -> Iterator[None]:
        """Watch; call `on_hang` with the findings, in the watching thread, before the process ends with exit code 1."""
        threading.Thread(target=self._watch, args=(on_hang,), name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            self._ended.set()
            self.rest()
            if self._talker is not None:
                self._talker.join(timeout=TALK_SECONDS)

    def _watch(self, on_hang: Callable[[str], object]) -> None:
        watched, heard, taken, silent, last = None, 0, 0.0, 0.0, time.monotonic()
        while not self._ended.wait(POLL_SECONDS):
            now, before = time.monotonic(), last
            last = now
            passed = min(now - before, 5 * POLL_SECONDS)  # a job that was suspended has not had the time in between
            doing, signs = self._doing, self._signs
            taken = taken + passed if doing is watched else 0.0
            silent = silent + passed if signs == heard and self._awaited is not None else 0.0
            watched, heard = doing, signs
            problem = None
            if doing is not None and taken > doing[1]:
                problem = self._slow(doing, taken)
            elif silent > max(self.step_seconds, SHORTEST_SILENCE):
                problem = self._frozen(doing, silent)
            if problem is not None:
                timer = threading.Timer(LAST_SECONDS, os._exit, [1])
                timer.daemon = True
                timer.start()
                try:
                    self._report(problem, on_hang)
                finally:
                    os._exit(1)

    def _slow(self, doing: tuple[str, float], seconds: float) -> str:
        what, limit = doing
        settings = {self.step_seconds: "run.step_timeout_minutes", self.phase_seconds: "run.timeout_minutes"}
        return f"no progress for {seconds:.0f} s in {what} ({settings.get(limit, 'for this')}: {limit:g} s)"

    def _frozen(self, doing: tuple[str, float] | None, seconds: float) -> str:
        while_ = f" in {doing[0]}" if doing is not None else ""
        limit = f"run.step_timeout_minutes: {self.step_seconds:g} s"
        return f"no sign of life from rank {self._awaited} for {seconds:.0f} s{while_} ({limit})"

    def _talk(self, store: Store) -> None:
        """Give signs of life, await those of the next rank, and answer where this process is once a hang was found."""
        following, before = (self.rank + 1) % self.world_size, -1
        has_answered = False
        try:
            while not self._ended.is_set():
                self._awaited = 0  # the store is rank 0's: as long as it does not answer, that one is silent
                store.add(f"alive/{self.rank}", 1)
                sign = store.add(f"alive/{following}", 0)
                while sign >= LEFT and following != self.rank:
                    following, before = (following + 1) % self.world_size, -1
                    sign = store.add(f"alive/{following}", 0)
                if sign != before:
                    self._signs += 1
                before = sign
                if not has_answered and store.check(["hang"]):
                    has_answered = True
                    store.set(f"hang/{self.rank}", json.dumps(asdict(place())))
                self._awaited = following
                self._ended.wait(TALK_SECONDS)
            store.add(f"alive/{self.rank}", LEFT)
        except RuntimeError:  # the store's process has ended: collectives, and the launcher, notice that
            self._awaited = None

    def _report(self, what: str, on_hang: Callable[[str], object]) -> None:
        places = {self.rank: place()}
        is_cut_off = False
        if self._store is not None:
            # In a thread of its own: if what hangs is the process that holds the store, it does not come back.
            gathering = threading.Thread(target=self._gather, args=(self._store, places), daemon=True)
            gathering.start()
            gathering.join(GATHERING_SECONDS + 2)
            is_cut_off = gathering.is_alive() and 0 not in places
        groups = grouped(dict(places), self.world_size)
        more = ""
        if is_cut_off and len(groups[0][1]) > 1:
            groups[0] = ("", [0], [])
            more = " The other ranks could not be asked, since rank 0 passes that on."
        odd = next(ranks for where, ranks, _ in groups if where)
        if self.rank == min(places):
            sys.stderr.write(f"rank {odd[0]} was here:\n{places[odd[0]].stack}")
            sys.stderr.flush()
        on_hang(f"{what}. {described(groups)}{more}")

    def _gather(self, store: Store, places: dict[int, Place]) -> None:
        """Add every process's place to `places`; those that do not answer are left out."""
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
    """Return where the main thread is: the innermost line in this package, and the function that it has called there.
    Where it waits for the next batch, return where the thread is that makes it."""
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
    """Return places with their ranks and hosts; the fewest ranks first, before them those without answer (place "")."""
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
    """Return one sentence for each of `groups`."""
    texts = []
    for where, ranks, hosts in groups:
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {listing(ranks, 8)}"
        if where:
            texts.append(f"{who} ({listing(hosts, 3)}) {'was' if len(ranks) == 1 else 'were'} {where}.")
        else:
            texts.append(f"{who} did not answer: stopped, or the machine or its network is gone.")
    return " ".join(texts)
