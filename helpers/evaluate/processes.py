"""Requests of several processes (`accelerate launch`), dealt out anew so that what begins alike is run by one of them.

lm-eval gives each of N processes every N-th document, which tears dialogues and the questions under a header apart.
Here all processes' requests are sorted as text and cut into N runs, about as long; answers go back to the process whose
request it was."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from itertools import accumulate, pairwise

from accelerate.utils import gather_object
from lm_eval.api.instance import Instance

from helpers.evaluate.prefixes import common


def dealt(lm, requests: list, answer: Callable[[list], list]) -> list:
    """What `answer` says to this process's `requests`, in order, though others may have been asked. Every process must
    call it; `answer` may be given no requests."""
    everyone = [(lm.rank, n, request.request_type, request.args) for n, request in enumerate(requests)]
    # Sorted alike in every process: sorting is stable, and all were gathered in the same order.
    everyone = sorted(gather_object(everyone), key=lambda one: text(one[-1]))
    ends = cuts([text(one[-1]) for one in everyone], lm.world_size)
    mine = everyone[ends[lm.rank] : ends[lm.rank + 1]]
    found = answer([Instance(kind, {}, arguments, n) for n, (_, _, kind, arguments) in enumerate(mine)])
    answers = gather_object([(rank, n, said) for (rank, n, _, _), said in zip(mine, found, strict=True)])
    return [said for _, said in sorted((n, said) for rank, n, said in answers if rank == lm.rank)]


def text(arguments: tuple) -> str:
    """A request's context and, if it has one, continuation."""
    return "".join(part for part in arguments if isinstance(part, str))


def cuts(texts: list[str], parts: int) -> list[int]:
    """Where sorted texts begin and end that each of `parts` processes is given: `parts` + 1 places. The longest share
    is as short as can be, in characters that it runs: what a share's first text has in common with the one before it
    is run on both sides. Within that, cuts lie where least is."""
    keys = [one.encode("utf-32-le", "surrogatepass") for one in texts]
    shared = [0, *(common(a, b) for a, b in pairwise(keys))]
    before = [0, *accumulate(len(one) - same for one, same in zip(texts, shared, strict=False))]

    def filled(longest: int) -> list[int]:
        ends = [0]
        while ends[-1] < len(texts):
            ends.append(bisect_right(before, longest + before[ends[-1]] - shared[ends[-1]]) - 1)
        return ends

    def length(start: int, stop: int) -> int:
        return before[stop] - before[start] + shared[start]

    least = max(map(len, texts), default=0)
    longest = bisect_left(range(before[-1]), True, lo=least, key=lambda n: len(filled(n)) <= parts + 1)
    ends = filled(longest)
    for k in range(len(ends) - 2, 0, -1):
        places = range(ends[k - 1] + 1, ends[k] + 1)
        ends[k] = min((n for n in places if length(n, ends[k + 1]) <= longest), key=shared.__getitem__)
    return ends + [len(texts)] * (parts + 1 - len(ends))
