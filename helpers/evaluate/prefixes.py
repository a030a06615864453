"""Requests whose tokens begin alike, as trees that are prefilled once.

Vocabulary. A *group* is a tree of tokens written one branch behind the other, a *column* a token. A *branch* is what a
request adds to the path of the one before it; a *path* is the columns that spell a request, as ranges. A dialogue is a
group of one branch, in which every turn's path ends earlier; questions under one few-shot header are a group with a
branch each.
"""

from array import array
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

# Requests to be answered share a slot if they share so many tokens: every row's attention runs over the whole slot,
# which a shorter header would not repay.
SHARED_TOKENS = 64
# For the same reason a slot's branches together are no longer than its longest request, so that no row looks at more
# than twice the columns it needs. A request that is wholly the beginning of another adds none.
TREE = 2
KEYS = 16  # so many copied keys and values take about the memory of one token's activations

Path = list[tuple[int, int]]


@dataclass
class Group:
    """Requests in one tree. `tokens`: of all branches; `positions`: of each token within its request; `branches`:
    (path before it, first column, last column + 1); `paths`: by request."""

    requests: list = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    branches: list[tuple[Path, int, int]] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    keys: int = 0  # columns that all branches together look at in a prefill

    def add(self, request, shared: int) -> None:
        """Add a request whose first `shared` tokens are those of the last one."""
        path, start = cut(self.paths[-1], shared) if shared else [], len(self.tokens)
        if new := request.tokens[shared:]:
            self.tokens += new
            self.positions += range(shared, len(request.tokens))
            self.branches.append((path, start, len(self.tokens)))
            self.keys += len(request.tokens)
            path = [*path, (start, len(self.tokens))]
        self.requests.append(request)
        self.paths.append(path)

    @property
    def columns(self) -> int:
        return len(self.tokens)

    @property
    def weight(self) -> int:
        """Tokens, and what else a prefill holds in units of a token's activations."""
        return self.columns + (self.keys - self.columns) // KEYS


def cut(path: Path, length: int) -> Path:
    """The first `length` columns of a path."""
    kept = []
    for start, stop in path:
        if length <= 0:
            break
        kept.append((start, min(stop, start + length)))
        length -= stop - start
    return kept


def ends(path: Path, count: int) -> list[int]:
    """The last `count` columns of a path."""
    columns: list[int] = []
    for start, stop in reversed(path):
        columns[:0] = range(max(start, stop - count + len(columns)), stop)
        if len(columns) == count:
            break
    return columns


def group_by_prefix(requests: list, rows: int, least: int = SHARED_TOKENS, most: int | None = None) -> list[Group]:
    """Requests (anything with `tokens`, none of it empty) as groups of up to `rows`, that share at least `least` tokens
    with the one before them or are its beginning; the group with most columns first. most: a group's weight, unless its
    first request has more (default: TREE times the first request's tokens as columns)."""
    keys = [array("I", request.tokens) for request in requests]
    for key in keys:
        key.byteswap()  # so that bytes sort as tokens do
    keys = [key.tobytes() for key in keys]
    groups: list[Group] = []
    # Backwards, the longest comes before its own beginnings.
    order = sorted(range(len(requests)), key=lambda n: keys[n], reverse=True)
    for before, n in pairwise([None, *order]):
        request, shared = requests[n], 0 if before is None else common(keys[before], keys[n])
        whole = shared == len(request.tokens)
        if groups and (whole or shared >= least) and len(groups[-1].requests) < rows:
            held = groups[-1].weight if most else groups[-1].columns
            limit = most or TREE * len(groups[-1].requests[0].tokens)
            if whole or held + len(request.tokens) - shared <= limit:
                groups[-1].add(request, shared)
                continue
        groups.append(Group())
        groups[-1].add(request, 0)
    return sorted(groups, key=lambda g: -g.columns)


def common(a: bytes, b: bytes) -> int:
    """How many tokens two keys begin with alike."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size // 4
    different = np.frombuffer(a, np.uint32, size // 4) != np.frombuffer(b, np.uint32, size // 4)
    return int(different.argmax())
