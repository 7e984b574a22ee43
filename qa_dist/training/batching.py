"""Which features are trained on together, and on which process: pure functions of lengths, seed and epoch.

Nothing here knows the number of processes until `shard`, so a global batch is the same set of features on every
world size; only its division differs.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

POOL = 16
"""Global batches whose features are sorted by length together. Larger pools pad less; smaller ones leave more to
chance which features meet in a batch: with 16, on SQuAD, a tenth less than without any sorting."""


@dataclass(frozen=True)
class MicroBatch:
    """What one process takes through the model at once."""

    indices: Indices
    """Positions of the features, [features]; never empty."""
    weight: float
    """1, or 0 for a filler: a feature run only because the other processes wait for this one."""


def plan_epoch(
    lengths: npt.NDArray[np.integer],
    *,
    seed: int,
    epoch: int,
    global_batch_size: int,
    tokens_per_batch: int | None = None,
    group_by_length: bool = True,
) -> list[Indices]:
    """The global batches of an epoch, in order; every feature is in exactly one of them.

    `lengths` [num_features] are in tokens. All batches hold `global_batch_size` features but the last, which
    holds what is left. With `group_by_length` the features of a batch have similar lengths: the shuffled epoch
    is divided into pools of 16 batches, each pool sorted by length and cut into batches, and the batches
    shuffled.

    With `tokens_per_batch` a batch holds as many features as have that many tokens, or somewhat fewer, instead of
    a fixed number; it has to be at least twice the longest feature.
    """
    order = _shuffled(len(lengths), seed, epoch, 0)
    if tokens_per_batch is None:
        full = len(lengths) // global_batch_size * global_batch_size
        # The short batch is drawn before anything is sorted, so that it is as random as the others.
        rest, order = order[full:], order[:full]
        size = POOL * global_batch_size
    else:
        rest = order[:0]
        size = max(int(POOL * tokens_per_batch / lengths.mean()), 1)
    batches: list[Indices] = []
    for at in range(0, len(order), size):
        pool = order[at : at + size]
        if group_by_length:
            pool = pool[np.argsort(-lengths[pool], kind="stable")]
        if tokens_per_batch is None:
            batches.extend(pool.reshape(-1, global_batch_size))
        else:
            batches.extend(_cut(pool, lengths[pool], tokens_per_batch))
    batches = [batches[i] for i in _shuffled(len(batches), seed, epoch, 1)]
    return [*batches, rest] if len(rest) else batches


def _cut(pool: Indices, lengths: npt.NDArray[np.integer], tokens_per_batch: int) -> list[Indices]:
    """Parts with about the same number of tokens each, at most `tokens_per_batch`."""
    ends = np.cumsum(lengths)
    # A part may run over its share by less than one feature.
    parts = -(-int(ends[-1]) // (tokens_per_batch - int(lengths.max()) + 1))
    shares = np.arange(1, parts) * (ends[-1] / parts)
    return [part for part in np.split(pool, np.searchsorted(ends, shares)) if len(part)]


def _shuffled(count: int, *seeds: int) -> Indices:
    """A random order of `count` things. NumPy keeps the raw output of a bit generator the same in every version,
    which it does not promise for `Generator.permutation`; a run may be resumed with another version."""
    keys = np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(count)
    return np.argsort(keys, kind="stable")


def shard(
    batch: Indices,
    lengths: npt.NDArray[np.integer],
    *,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    cost_of_micro_batch: int | None = None,
) -> list[MicroBatch]:
    """The part of a global batch that `rank` computes, as micro-batches of at most `micro_batch_size` features.

    The features, longest first, are dealt out to the ranks to and fro (0 1 2 2 1 0 …), so that all have about the
    same number of tokens, and cut into accumulation steps, so that those of one step have similar lengths. There are
    as few steps as will do; or, with `cost_of_micro_batch`, as many as make padding and steps cheapest together,
    where a step costs as much as that many tokens. All ranks get the same number of micro-batches; a rank for which
    no feature is left gets a filler of weight zero.
    """
    batch = batch[np.argsort(-lengths[batch], kind="stable")]
    laps = -(-len(batch) // world_size)  # features of the rank that gets most
    fewest = -(-laps // micro_batch_size)
    steps = fewest
    if cost_of_micro_batch is not None:
        widest = lengths[batch[::world_size]]  # of each lap

        def cost(steps: int) -> float:
            cuts = _even_cuts(laps, steps)
            return float((widest[cuts[:-1]] * np.diff(cuts)).sum() + cost_of_micro_batch * steps)

        steps = min(range(fewest, laps + 1), key=cost)
    position = np.arange(len(batch))
    lap, place = position // world_size, position % world_size
    owner = np.where(lap % 2 == 0, place, world_size - 1 - place)
    result = []
    cuts = _even_cuts(laps, steps)
    for begin, end in zip(cuts[:-1] * world_size, cuts[1:] * world_size, strict=True):
        step = batch[begin:end]
        own = step[owner[begin:end] == rank]
        # the shortest feature is the cheapest filler
        result.append(MicroBatch(own, 1.0) if len(own) else MicroBatch(step[-1:], 0.0))
    return result


def _even_cuts(count: int, parts: int) -> npt.NDArray[np.int64]:
    """Borders of `parts` parts of a range, sizes differing by one at most, [parts + 1]."""
    return np.arange(parts + 1) * count // parts


def evaluation_batches(lengths: npt.NDArray[np.integer], batch_size: int) -> list[Indices]:
    """Batches for evaluation, longest features first, so that running out of memory shows at once.

    They do not depend on the number of processes: each runs whole batches, so that every feature is computed in
    the same company, and to the same last bit, on any world size.
    """
    order = np.argsort(-lengths, kind="stable")
    return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
