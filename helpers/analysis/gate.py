"""May a quantized configuration replace full precision? A gate for continuous integration.

    python -m helpers.analysis.gate executed/STUDY nf4 --least-recovery 95 --largest-loss 2

Prints one line, writes FOLDER/CONFIGURATION/gate.json and exits with 0 (pass), 1 (fail), 2 (these dialogues are too few
to say) or 3 (no results to judge, or a wrong argument). Make's own status is 2 for anything but a pass; who needs the
difference calls this. The rule is helpers.analysis.recovery.gate: the one-sided bound at the study's confidence, not
the estimate, must keep the threshold.
"""

import argparse
import math
import sys
import traceback

from helpers import StudyError, results
from helpers.analysis import contrasts, frames, recovery
from helpers.analysis.style import number

STATUS = {"pass": 0, "fail": 1, "too small": 2}
LEAST_RECOVERY = 95.0  # per cent, if no threshold is given


def judge(f, configuration: str, least_recovery=None, largest_loss=None) -> dict:
    """recovery.gate of a configuration's F1 on all turns vs full precision, as JSON values.

    least_recovery: per cent of full precision's mean; largest_loss: points of 100. Of the two, None is not asked for;
    if both are, least_recovery is 95. Losses and differences in the result are in points, `needed` is None if no number
    of dialogues would do. Raises StudyError if the configuration or full precision has no answers.
    """
    least_recovery = LEAST_RECOVERY if least_recovery is largest_loss is None else least_recovery
    if least_recovery is not None and not 0 < least_recovery <= 100:
        raise StudyError(f"LEAST_RECOVERY={least_recovery:g}: is a percentage of full precision's score, 0 to 100")
    if largest_loss is not None and not largest_loss >= 0:
        raise StudyError(f"LARGEST_LOSS={largest_loss:g}: is a loss in points, 0 or more")
    wide, options = f.wide("f1"), contrasts.options(f)
    names = [name for name in wide if name != f.full]
    if f.full not in wide:
        raise StudyError(f"{f.study.study}: full precision has no answers to compare with; run make run-all first")
    if configuration not in names:
        raise StudyError(f"CONFIG={configuration}: has no answers in this study; choose from {', '.join(names)}")
    bounds = least_recovery or 0.0, math.inf if largest_loss is None else largest_loss / 100
    row = recovery.gate(wide[f.full], wide[configuration], contrasts.clusters(wide), *bounds, **options)
    row |= {key: 100 * row[key] for key in ("difference", "difference_bound") if row[key] is not None}
    row["needed"] = int(row["needed"]) if row["needed"] and math.isfinite(row["needed"]) else None
    asked = {"configuration": configuration, "full": f.full}
    asked |= {"least_recovery": least_recovery, "largest_loss": largest_loss}
    return asked | row | {"confidence": options["confidence"], "n_questions": len(wide)}


def sentence(f: frames.Frames, row: dict) -> str:
    """The verdict in one line."""
    asked = [f"recovery of at least {row['least_recovery']:g}%"] if row["least_recovery"] is not None else []
    asked += [f"loss of at most {row['largest_loss']:g} points"] if row["largest_loss"] is not None else []
    what = f"{f.label(row['configuration'])} vs {f.label(row['full'])}, F1"
    if row["reason"]:
        return f"n too small: {what}: {row['reason']}"
    text = (
        f"{what}: {' and '.join(asked)} asked; recovery {number(row['recovery'], 1)}%, {row['confidence']:.0%} lower "
        f"bound {number(row['recovery_bound'], 1)}%; difference {number(row['difference'], 1, True)} points, bound "
        f"{number(row['difference_bound'], 1, True)}; {row['n_dialogues']} dialogues"
    )
    if row["gate"] != "too small":
        return f"{row['gate']}: {text}"
    need = (
        f"needs {row['needed']:,} dialogues" if row["needed"] else "the estimate itself misses: more would not pass it"
    )
    return f"n too small: {need} (80% power): {text}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers.analysis.gate")
    parser.add_argument("folder")
    parser.add_argument("configuration")
    parser.add_argument("--least-recovery", type=float, metavar="PERCENT")
    parser.add_argument("--largest-loss", type=float, metavar="POINTS")
    try:
        given = vars(parser.parse_args())
    except SystemExit as wrong:  # argparse's 2 would read as "n too small"
        return 3 if wrong.code else 0
    try:
        f = frames.load(given.pop("folder"))
        row = judge(f, **given)
        results.write_json(results.folder(f.study) / row["configuration"] / "gate.json", row)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 3
    print(sentence(f, row))
    return STATUS[row["gate"]]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception:  # Python's own status for it is 1, which would read as "fail"
        traceback.print_exc()
        sys.exit(3)
