"""The next batch is made while the present one is trained on."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def made_ahead(items: Iterable[Item], make: Callable[[Item], Made]) -> Iterator[tuple[Item, Made, float]]:
    """For each item: the item, `make(item)`, and the seconds that were spent waiting for it.

    One item ahead is made in a thread. What `make` raises is raised here, where the item would have come.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
        pending: tuple[Item, Future[Made]] | None = None
        for item in items:
            following = (item, pool.submit(make, item))
            if pending is not None:
                yield _waited(*pending)
            pending = following
        if pending is not None:
            yield _waited(*pending)


def _waited(item: Item, future: "Future[Made]") -> tuple[Item, Made, float]:
    started = time.perf_counter()
    made = future.result()
    return item, made, time.perf_counter() - started
