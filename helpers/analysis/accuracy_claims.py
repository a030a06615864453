"""Claims about accuracy, judged on last turns, the paper's estimand; all turns and exact match are told beside it.

Direction: statistics.verdict, adjusted over the primary contrasts. Size: the interval lies in a band around the
reported value as wide as the paper's own sampling error (its 50 questions, this study's spread per question); in
recovery where the model is another one, for five points of 62 are not five of 24. Equality: within statistics.margin.
"""

import math

from helpers import statistics
from helpers.analysis import contrasts, recovery
from helpers.analysis.evidence import FAILS, HOLDS, OPEN, Facts, NotMeasured, Verdict, contrast, size_mb
from helpers.analysis.style import number, percent, points

SAME_SIZE = 0.01  # share: less is the allocator's rounding


def _direction(row, claimed: str) -> str:
    """Does b lie on the claimed side ("above", "below") of a? Equality contradicts either side."""
    if row.verdict == claimed:
        return HOLDS
    return OPEN if row.verdict.startswith("n too small") else FAILS


def _no_loss(row, margin: float) -> str:
    """Is a loss beyond the margin ruled out (one-sided)?"""
    return HOLDS if row.equal_low > -margin else FAILS if row.equal_high < -margin else OPEN


def _within(low: float, high: float, reported: float, half: float) -> str:
    """An interval and the band of `half` on either side of the reported value."""
    if low > reported + half or high < reported - half:
        return FAILS
    return HOLDS if low >= reported - half and high <= reported + half else OPEN


def _size(facts: Facts, row) -> tuple[str, str]:
    """Verdict on the reported size, and its text. The band is the interval that the paper's questions would have
    had."""
    f, paper = facts.f, facts.paper
    widen = math.sqrt(row.n_dialogues / paper["questions"])
    theirs = contrasts.reported_difference(paper, row.a, row.b, "coqa_f1")
    if facts.same_model:
        low, high, reported, form = row.ci_low, row.ci_high, theirs, points
    else:
        wide = f.wide("f1", last_turns=True)
        found = recovery.recovery(wide[row.a], wide[row.b], contrasts.clusters(wide), **contrasts.options(f))
        if found["ci_low"] is None:
            return OPEN, found["reason"]
        reported = 100 * (1 + theirs / contrasts.reported(paper, "fp16" if row.a == f.full else row.a, "coqa_f1"))
        low, high = found["ci_low"], found["ci_high"]

        def form(value):
            return f"{number(value, 0)}%"

    half = (high - low) / 2 * widen
    what = "difference" if facts.same_model else f"{f.label(row.b)}/{f.label(row.a)}"
    band = f"the paper's {form(reported)} is good for {form(reported - half)} to {form(reported + half)}"
    return _within(low, high, reported, half), f"{what} {form(low)} to {form(high)}, {band}"


def _said(facts: Facts, row, what: str) -> str:
    f = facts.f
    low, high = (row.low, row.high) if row.primary else (row.ci_low, row.ci_high)
    counted = f"{row.n_questions:,} questions of {row.n_dialogues:,} dialogues"
    difference = f"{points(row.difference)} points [{points(low)}, {points(high)}]"
    return f"{what}: {f.label(row.b)} vs {f.label(row.a)} {difference} ({counted}), {row.verdict}"


def _accuracy(facts: Facts, a: str, b: str, rule, sized: bool = False, part: str = "direction") -> Verdict:
    """`rule` takes a contrast and gives a verdict: on last turns it decides, elsewhere it is told."""
    row = contrast(facts, facts.last, a, b)
    main = rule(row)
    texts, beside = [_said(facts, row, "last turns")], []
    for table, what in ((facts.every, "all turns"), (facts.em, "exact match, last turns")):
        try:
            other = contrast(facts, table, a, b)
            beside.append(rule(other))
            texts.append(_said(facts, other, what))
        except NotMeasured as missing:
            beside.append(OPEN)
            texts.append(f"{what}: {missing}")
    size = None
    if sized:
        size, text = _size(facts, row)
        texts.insert(1, f"size: {text}")
    if beside[0] != main:
        texts.append("all turns decide what last turns leave open" if main == OPEN else "last and all turns disagree")
    verdict = FAILS if FAILS in (main, size) else main
    return Verdict(verdict, "; ".join(texts), size=size, all_turns=beside[0], em=beside[1], **{part: main})


def nf4_beats_full(facts):
    return _accuracy(facts, facts.f.full, "nf4", lambda row: _direction(row, "above"), sized=True)


def nf4_matches_full(facts):
    margin = contrasts.margin(facts.f)
    return _accuracy(facts, facts.f.full, "nf4", lambda row: _no_loss(row, margin), part="equality")


def fp4_below_nf4(facts):
    return _accuracy(facts, "nf4", "fp4", lambda row: _direction(row, "below"), sized=True)


def fp4_below_full(facts):
    return _accuracy(facts, facts.f.full, "fp4", lambda row: _direction(row, "below"))


def nf4_pareto(facts):
    """A family of its own: NF4 against every other configuration, adjusted together."""
    f = facts.f
    size, wide = size_mb(facts, "nf4", "allocated"), f.wide("f1", last_turns=True)
    others = [name for name in wide if name != "nf4"]
    if not others or "nf4" not in wide:
        raise NotMeasured("F1 of NF4 and other configurations was not compared in this study")
    rows = statistics.compare(
        wide, contrasts.clusters(wide), [(n, "nf4") for n in others], True, **contrasts.options(f)
    )
    smaller = [name for name in others if f.sizes.allocated.get(name, math.nan) < size * (1 - SAME_SIZE)]
    better = [row["a"] for row in rows if statistics.differs(row) == "below"]
    unclear = [row["a"] for row in rows if statistics.differs(row) is None]
    parts = [f"{f.label(name)} takes less memory" for name in smaller]
    parts += [f"{f.label(name)} has a higher F1" for name in better]
    start = f"NF4 takes {number(size, 0)} MB; last turns, adjusted over {len(rows)} comparisons"
    if parts:
        return Verdict(FAILS, f"{start}: {', '.join(parts)}")
    if unclear:
        return Verdict(OPEN, f"{start}: F1 does not separate NF4 from {', '.join(map(f.label, unclear))}")
    return Verdict(HOLDS, f"{start}: nothing is smaller, and every other F1 is lower")


def fifty_give_direction(facts):
    """A pair's direction is seen if nearly all draws agree on it; the share's interval decides, whichever way
    round."""
    f, design = facts.f, next((d for d in facts.designs if d["design"] == "last turns"), None)
    if design is None:
        raise NotMeasured("the design of 50 questions was not redrawn in this study")
    found, parts = [], []
    for row in design["comparisons"]:
        side = max(("above", "below"), key=lambda side: row[f"share_{side}"])
        low, high = row[f"share_{side}_low"], row[f"share_{side}_high"]
        text = f"{f.label(row['b'])} {side} {f.label(row['a'])} in {percent(row[f'share_{side}'])}"
        parts.append(text if low is None else f"{text} [{percent(low)}, {percent(high)}]")
        if low is not None:
            sure = design["confidence"]
            other = row[f"share_{'below' if side == 'above' else 'above'}_high"]
            found.append(HOLDS if low >= sure else FAILS if max(high, other) < sure else OPEN)
    if not found:
        raise NotMeasured(design["comparisons"][0]["reason"])
    verdict = FAILS if FAILS in found else OPEN if OPEN in found else HOLDS
    drawn = f"{design['draws']:,} redraws of {design['size']} last turns, from {design['dialogues']:,} dialogues"
    return Verdict(
        verdict, f"{drawn}: {'; '.join(parts)}; asked: the same direction in {percent(design['confidence'], 0)}"
    )
