"""How numbers, tables and sentences look: one minus sign, one per cent style, everything from outside escaped."""

import html

import pandas as pd
from IPython.display import HTML, display

NONE = "–"


def number(value, digits: int = 2, signed: bool = False) -> str:
    """A number as text with a true minus sign, or a dash for None and NaN."""
    if value is None or pd.isna(value):
        return NONE
    text = f"{value:{'+' if signed else ''},.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "\N{MINUS SIGN}")


def significant(value, digits: int = 3) -> str:
    """Three digits, whatever the size: 0.0123, 1.23, 12.3, 1,230."""
    if value is None or pd.isna(value):
        return NONE
    rounded = float(f"{value:.{digits}g}")
    decimals = max(0, digits - 1 - (len(str(int(abs(rounded)))) - 1)) if abs(rounded) >= 1 else None
    return number(rounded, decimals) if decimals is not None else f"{rounded:.{digits}g}".replace("-", "\N{MINUS SIGN}")


def points(value, signed: bool = True) -> str:
    """A share or a difference of shares in points of 100: +2.5."""
    return number(None if value is None else 100 * value, 1, signed)


def percent(value, digits: int = 1, signed: bool = False) -> str:
    """A share as 58.4%."""
    text = number(None if value is None else 100 * value, digits, signed)
    return text if text == NONE else f"{text}%"


def times(value, digits: int = 2) -> str:
    """A ratio as 1.98x."""
    text = number(value, digits)
    return text if text == NONE else f"{text}x"


def interval(low, high, form=points) -> str:
    """[low, high], or nothing where there is none."""
    return "" if low is None or pd.isna(low) else f"[{form(low)}, {form(high)}]"


def p_value(value) -> str:
    return NONE if value is None or pd.isna(value) else "< 0.001" if value < 0.001 else number(value, 3)


def with_interval(frame: pd.DataFrame, value: str, low: str, high: str, form=points) -> pd.Series:
    """`value [low, high]` as text, row by row."""
    rows = zip(frame[value], frame[low], frame[high])
    texts = [f"{form(middle)} {interval(lower, upper, form)}".strip() for middle, lower, upper in rows]
    return pd.Series(texts, index=frame.index, dtype=object)


def lines(value) -> str:
    """Parts of a sentence on lines of their own; the page keeps line breaks in cells."""
    return value.replace("; ", ";\n") if isinstance(value, str) else NONE


def link(text: str, address: str) -> str:
    """What `show` turns into a link, in a column that it is told holds links."""
    return f'<a href="{html.escape(address)}">{html.escape(text)}</a>'


def say(*sentences: str, kind: str = "") -> None:
    """Paragraphs; every sentence is escaped. kind: note (small print) or warning."""
    start = f'<p class="{kind}">' if kind else "<p>"
    display(HTML("".join(f"{start}{html.escape(sentence)}</p>" for sentence in sentences if sentence)))


def note(*sentences: str) -> None:
    say(*sentences, kind="note")


def bullets(sentences: list[str]) -> None:
    display(HTML("<ul>" + "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences) + "</ul>"))


def show(frame: pd.DataFrame, missing: str = "Not measured in this study.", links: str = "", **forms) -> None:
    """A table without its index and without columns that hold nothing. `forms` maps columns to functions that write
    their values; every cell is escaped but those of the column `links`, which `link` wrote."""
    if frame.empty:
        return note(missing)

    def cell(name: str, value) -> str:
        text = forms[name](value) if name in forms else plain(value)
        return text if name == links else html.escape(text)

    table = pd.DataFrame({html.escape(str(name)): [cell(name, value) for value in frame[name]] for name in frame})
    table = table.loc[:, (table != NONE).any()]
    raw = dict.fromkeys(table, str)  # pandas would write a line break as two letters
    display(HTML(table.to_html(index=False, escape=False, border=0, classes="study", formatters=raw)))


def plain(value) -> str:
    if value is None or value is pd.NaT or value != value:
        return NONE
    return f"{value:,.6g}".replace("-", "\N{MINUS SIGN}") if isinstance(value, float) else str(value)
