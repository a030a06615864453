"""Claims about accuracy, judged on last turns, the paper's estimand; all turns and exact match are told beside it.

Direction: statistics.verdict, adjusted over the primary contrasts. Size: the interval holds the reported value and lies
in a band around it as wide as the paper's own sampling error (its 50 questions, this study's spread per question); in
recovery where the model is another one, for five points of 62 are not five of 24. Equality: within statistics.margin,
adjusted as well. A claim that has two parts holds if both do, and "in direction alone" if only
that part does.
"""

import math

import pandas as pd

from helpers import statistics
from helpers.analysis import contrasts, evidence, recovery, sentences
from helpers.analysis.evidence import FAILS, HOLDS, OPEN, Facts, NotMeasured, Verdict, all_of, contrast
from helpers.analysis.style import number, percent, points


def _direction(row, claimed: str) -> str:
    """Does b lie on the claimed side ("above", "below") of a? Equality contradicts either side."""
    if row.verdict == claimed:
        return HOLDS
    return OPEN if row.verdict.startswith("n too small") else FAILS


def _no_loss(row, margin: float) -> str:
    """Is a loss beyond the margin ruled out (one-sided)?"""
    return HOLDS if row.equal_low > -margin else FAILS if row.equal_high < -margin else OPEN


def _within(low: float, high: float, reported: float, half: float) -> str:
    """An interval, the reported value, and a band of `half` on either side of it."""
    if low > reported + half or high < reported - half:
        return FAILS
    return HOLDS if reported - half <= low <= reported <= high <= reported + half else OPEN


def _size(facts: Facts, row) -> tuple[str, str]:
    """Verdict on the reported size, and its text. The band is the interval that the paper's questions would have
    had."""
    f, paper = facts.f, facts.paper
    theirs = contrasts.reported_difference(paper, row.a, row.b, "coqa_f1")
    if facts.same_model:
        low, high, reported, form, what = row.ci_low, row.ci_high, theirs, points, " points"
    else:
        wide = f.wide("f1", last_turns=True)
        found = recovery.recovery(wide[row.a], wide[row.b], contrasts.clusters(wide), **contrasts.options(f))
        if found["ci_low"] is None:
            return OPEN, found["reason"]
        reported = 100 * (1 + theirs / contrasts.reported(paper, "fp16" if row.a == f.full else row.a, "coqa_f1"))
        low, high, what = found["ci_low"], found["ci_high"], f"% of {f.label(row.a)}'s F1"

        def form(value):
            return number(value, 0)

    half = (high - low) / 2 * math.sqrt(row.n_dialogues / paper["questions"])
    band = f"{form(reported)} [{form(reported - half)}, {form(reported + half)}] from {paper['questions']} questions"
    return _within(low, high, reported, half), f"{form(low)} to {form(high)}{what}, the paper's {band}"


def _told(row, what: str) -> str:
    low, high = (row.low, row.high) if row.primary else (row.ci_low, row.ci_high)
    value = f"{points(row.difference)} points [{points(low)}, {points(high)}]"
    return f"{what}: {value}, {row.verdict} (n = {row.n_questions:,} in {row.n_dialogues:,} dialogues)"


def _accuracy(facts: Facts, a: str, b: str, rule, sized: bool = False, part: str = "direction") -> Verdict:
    """`rule` takes a contrast and gives a verdict: on last turns it decides, elsewhere it is told."""
    row = contrast(facts, facts.last, a, b)
    main, size, beside = rule(row), None, []
    texts = [f"{facts.f.label(b)} vs {facts.f.label(a)}, {_told(row, 'last turns')}"]
    last = facts.f._replace(samples=facts.f.samples[facts.f.samples.last_turn])
    if parts := sentences.by_data_set(last, row):
        texts.append(", ".join(parts))
    if sized:
        size, text = _size(facts, row)
        texts.append(f"size: {text}")
    for table, what in ((facts.every, "all turns"), (facts.em, "exact match, last turns")):
        try:
            other = contrast(facts, table, a, b)
            beside.append(rule(other))
            texts.append(_told(other, what))
        except NotMeasured as missing:
            beside.append(OPEN)
            texts.append(f"{what}: {missing}")
    if beside[0] != main:
        texts.append(f"all turns alone: {beside[0]}" if main == OPEN else f"last turns: {main}, all turns: {beside[0]}")
    verdict = evidence.DIRECTION if main == HOLDS and size in (OPEN, FAILS) else all_of([main, size or HOLDS])
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
    """NF4 against every other configuration, in one family with the primary contrasts, so that it never finds what they
    don't. One that is better decides, whatever the memory."""
    f, wide = facts.f, facts.f.wide("f1", last_turns=True)
    others = [name for name in wide if name != "nf4"]
    if not others or "nf4" not in wide:
        raise NotMeasured("F1 of NF4 and other configurations was not compared in this study")
    pairs = [(name, "nf4") for name in others] + [p for p in contrasts.primary_pairs(f, list(wide)) if "nf4" not in p]
    rows = statistics.compare(wide, contrasts.clusters(wide), pairs, True, **contrasts.options(f))
    sides = {row["a"]: statistics.differs(row) for row in rows[: len(others)]}
    start = f"last turns, adjusted over {len(rows)} comparisons"
    if better := [f.label(name) for name, side in sides.items() if side == "below"]:
        return Verdict(FAILS, f"{start}, a higher F1: {', '.join(better)}")
    size = evidence.size_mb(facts, "nf4", "allocated")
    smaller = [f.label(n) for n in others if f.sizes.allocated.get(n, math.nan) < size * (1 - evidence.SAME_SIZE)]
    if smaller:
        return Verdict(FAILS, f"smaller than NF4's {number(size, 0)} MB: {', '.join(smaller)}")
    memory = f.sizes.allocated.reindex(others)
    if unknown := [f.label(n) for n in others if pd.isna(memory[n]) and not f.configurations.same_kernels.get(n)]:
        return Verdict(OPEN, f"the memory of {', '.join(unknown)} was not measured")
    if unclear := [f.label(name) for name, side in sides.items() if side is None]:
        return Verdict(OPEN, f"{start}: F1 does not separate NF4 from {', '.join(unclear)}")
    return Verdict(HOLDS, f"{start}: every other F1 is lower, and nothing is smaller than {number(size, 0)} MB")


def fifty_give_direction(facts):
    """A pair's direction is seen if nearly all draws agree on it; the share's interval decides, whichever way
    round."""
    f, design = facts.f, next((d for d in facts.designs if d["design"] == "last turns"), None)
    if design is None:
        raise NotMeasured("the design of 50 questions was not redrawn in this study")
    found, parts, sure = [], [], design["confidence"]
    for row in design["comparisons"]:
        side, other = sorted(("above", "below"), key=lambda side: -row[f"share_{side}"])
        low, high = row[f"share_{side}_low"], row[f"share_{side}_high"]
        text = f"{f.label(row['b'])} {side} {f.label(row['a'])} in {percent(row[f'share_{side}'])}"
        parts.append(text if low is None else f"{text} [{percent(low)}, {percent(high)}]")
        if low is not None:
            most = max(high, row[f"share_{other}_high"])
            found.append(HOLDS if low >= sure else FAILS if most < sure else OPEN)
    if not found:
        raise NotMeasured(design["comparisons"][0]["reason"])
    drawn = f"{design['draws']:,} repeats with {design['size']} last turns out of {design['dialogues']:,}"
    return Verdict(all_of(found), f"{drawn}: {', '.join(parts)}; enough would be {percent(sure, 0)} on one side")
