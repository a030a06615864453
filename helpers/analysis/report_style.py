"""How the report writes numbers, tables and lists, and how its functions look things up in the numbers (`n`, see helpers.report)."""

import html

import pandas as pd

STYLE = """<style>
.jp-InputPrompt, .jp-OutputPrompt { display: none !important; }
.jp-Cell { padding-top: 0 !important; padding-bottom: 0 !important; }
figure { margin: 1rem 0; } figcaption { color: #555; font-size: 0.8rem; }
.jp-Notebook, body { max-width: 62rem; margin: 0 auto !important; }
table.study { border-collapse: collapse; margin: 0.5rem 0 1rem; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
table.study th { text-align: left !important; border-bottom: 2px solid #444; padding: 0.25rem 0.7rem; vertical-align: bottom; }
table.study td { text-align: left !important; border-bottom: 1px solid #ddd; padding: 0.25rem 0.7rem;
  vertical-align: top; white-space: normal; }
table.study tr:hover { background: #f5f5f5; }
p.note { color: #555; font-size: 0.85rem; }
p.warning { border-left: 4px solid #d55e00; padding-left: 0.7rem; }
</style>"""

NONE = "–"


def number(value, digits: int = 2, signed: bool = False) -> str:
    """A number as text, with a true minus sign; a dash if there is none."""
    if value is None:
        return NONE
    text = f"{value:+,.{digits}f}" if signed else f"{value:,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def points(value, digits: int = 1, signed: bool = False) -> str:
    """A share in [0, 1] as points of 100."""
    return number(None if value is None else 100 * value, digits, signed)


def bracket(low, high, render=points) -> str:
    return f"[{render(low)}, {render(high)}]" if low is not None else ""


def p_value(value) -> str:
    return NONE if value is None else "< 0.001" if value < 0.001 else number(value, 3)


def table(frame: pd.DataFrame, note: str = "") -> str:
    """HTML of a table; every cell and header is escaped."""
    if frame.empty:
        return note_line(note or "Not measured in this study.")
    return frame.to_html(index=False, escape=True, border=0, classes="study", na_rep=NONE) + (
        note_line(note) if note else ""
    )


def note_line(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def paragraphs(sentences: list[str]) -> str:
    return "".join(f"<p>{html.escape(s)}</p>" for s in sentences)


def bullets(sentences: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(s)}</li>" for s in sentences) + "</ul>"


def rows_of(n: dict, key: str, **wanted) -> list[dict]:
    found = n.get(key) or []
    return [row for row in found if all(row.get(k) == v for k, v in wanted.items())]


def one(rows: list[dict]) -> dict | None:
    return rows[0] if rows else None


def name_of(n: dict, configuration: str) -> str:
    return n["labels"].get(configuration, configuration)


def difference_of(n: dict, rows: list[dict], a: str, b: str, metric: str) -> dict | None:
    """The comparison b minus a, whichever way round it was stored."""
    for row in rows or []:
        if row["metric"] == metric and {row["a"], row["b"]} == {a, b} and row.get("difference") is not None:
            if row["a"] == a:
                return row
            flip = {"a": a, "b": b, "difference": -row["difference"], "mean_a": row["mean_b"], "mean_b": row["mean_a"]}
            turned = row["ci_low"] is not None
            return (
                row
                | flip
                | {"ci_low": -row["ci_high"] if turned else None, "ci_high": -row["ci_low"] if turned else None}
            )
    return None


def says(row: dict | None) -> str | None:
    """What an interval allows to be said: 'above', 'below', 'not told apart', or none without an interval."""
    if row is None or row.get("ci_low") is None:
        return None
    return "above" if row["ci_low"] > 0 else "below" if row["ci_high"] < 0 else "not told apart"
