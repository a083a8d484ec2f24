"""The order of batches: a pure function of (seed, epoch), whichever process reads and wherever it starts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import torch

from training.data.splits import Batch, Split

PREFETCH = 2


def derive_seed(*parts: int | str) -> int:
    """A seed below 2^63 of any numbers and words; different parts give unrelated seeds."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """Full batches in an epoch; the rest of each epoch's shuffle is left out."""
    return len(split.labels) // batch_size


def share(n: int, rank: int, ranks: int) -> slice:
    """The part of `n` items that process `rank` of `ranks` takes: contiguous, sizes differ by at most one."""
    return slice(n * rank // ranks, n * (rank + 1) // ranks)


def train_batches(
    split: Split, batch_size: int, seed: int, epoch: int, first_step: int = 0, rank: int = 0, ranks: int = 1
) -> Iterator[Batch]:
    """This process's part of an epoch's batches from `first_step` on; `batch_size` counts all processes."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    order = torch.randperm(len(split.labels), generator=generator)
    part = share(batch_size, rank, ranks)

    def read(step: int) -> Batch:
        indices = order[step * batch_size : (step + 1) * batch_size]
        return split.train_batch(indices, derive_seed(seed, "augment", epoch, step), part)

    return _prefetch(read, range(first_step, steps_per_epoch(split, batch_size)))


def eval_batches(split: Split, batch_size: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
    """This process's share of a split, in order, in batches of `batch_size`; the last one may be smaller."""
    mine = torch.arange(len(split.labels))[share(len(split.labels), rank, ranks)]
    batches = mine.split(batch_size) if len(mine) else ()
    return _prefetch(lambda i: split.eval_batch(batches[i]), range(len(batches)))


def _prefetch(read: Callable[[int], Batch], steps: range) -> Iterator[Batch]:
    """read(step) for each step, the next `PREFETCH` of them prepared by a thread while the caller works."""
    pool = ThreadPoolExecutor(1)
    try:
        remaining = iter(steps)
        waiting = [pool.submit(read, step) for step in islice(remaining, PREFETCH)]
        while waiting:
            batch = waiting.pop(0).result()
            waiting += [pool.submit(read, step) for step in islice(remaining, 1)]
            yield batch
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
