"""Processes that are frozen while the others do something that may take its time. Real processes, real signals."""

import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import sys
from datetime import timedelta
from torch.distributed import TCPStore
from qa_dist.training import watchdog

watchdog.SHORTEST_SILENCE, watchdog.GATHERING_SECONDS, watchdog.TALK_SECONDS = 4.0, 2.0, 0.5
rank, port = map(int, sys.argv[1:])
store = TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False, timeout=timedelta(seconds=60))
dog = watchdog.Watchdog(rank, 3, phase_seconds=3600, step_seconds=0.5)
with dog.watching(lambda text: print(text, flush=True)):
    print(f"port {store.port}", flush=True)
    store.set(f"joined/{rank}", "yes")
    store.wait([f"joined/{i}" for i in range(3)])
    dog.talk_through(store)
    dog.phase("preparing the data")
    sys.stdin.read()
"""


class Three:
    """Three processes that watch each other."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[str]] = []
        port = "0"
        for rank in range(3):
            command = [sys.executable, "-c", PROGRAM, str(rank), port]
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
            self.processes.append(process)
            if rank == 0:
                assert process.stdout is not None
                port = process.stdout.readline().split()[1]

    def __enter__(self) -> list["subprocess.Popen[str]"]:
        for process in self.processes[1:]:
            assert process.stdout is not None
            assert process.stdout.readline().split()[0] == "port"
        return self.processes

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.mark.timeout(120)
def test_a_frozen_process_is_found_whatever_the_others_do():
    """Also that one which holds the store; a process that has ended in order is none."""
    with Three() as first, Three() as second:
        first[0].send_signal(signal.SIGSTOP)
        assert second[1].communicate(timeout=30)[0] == ""
        time.sleep(8)  # twice as long as a process may be silent
        assert [process.poll() for process in second] == [None, 0, None]
        second[2].send_signal(signal.SIGSTOP)
        for process, frozen in ((first[1], 0), (first[2], 0), (second[0], 2)):
            assert process.wait(timeout=60) == 1
            assert process.stdout is not None
            said = process.stdout.read()
            assert said.startswith(f"no sign of life from rank {frozen} for ")
            assert "in preparing the data (run.step_timeout_minutes: 0.5 s). rank" in said
            silent = "ranks 1, 2" if frozen else "rank 0"  # of which rank 1 has ended
            assert f"{silent} did not answer: stopped, or the machine or its network is gone" in said
            assert ("The other ranks could not be asked" in said) == (frozen == 0)
