"""YAML files and their checked values: what is wrong is one sentence with file, line or key, and what to write.

values = checked_yaml.read(path)                         # refuses what YAML 1.1 would silently turn into something else
study = checked_yaml.validate(Study, values, "params/x/study.yaml")      # a pydantic model
"""

import difflib
import re
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError

from helpers import StudyError

# Of studies, configurations and sources: what is safe as a file name, a target of Make and a word of a shell.
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
LINE = r"^[^\p{Cc}\p{Zl}\p{Zp}]{1,300}$"  # Rust's syntax, pydantic's own
PATTERNS = {NAME: "up to 64 letters, digits, dots, hyphens and underscores, the first a letter or digit"}
PATTERNS |= {LINE: "one line of text, without control characters"}
# What a wrong type is told: pydantic's error, what was expected.
EXPECTED = {"int_type": "a whole number", "float_type": "a number", "string_type": "text", "bool_type": "true or false"}
EXPECTED |= {"list_type": "a list", "dict_type": "keys and values", "model_type": "keys and values"}


def _wrong_type(given, expected: str) -> str:
    """Such as: is the text '64', expected a whole number; did you mean 64, without quotes?"""
    said = f"is {repr(given)[:60]}, expected {expected}"
    if isinstance(given, str) and "number" in expected:
        try:
            return f"is the text {given!r}, expected {expected}; did you mean {float(given):.15g}, without quotes?"
        except ValueError:
            return said
    if isinstance(given, bool):
        return said + "; YAML reads yes, no, on and off as true and false"
    if given is None:
        return f"is empty, expected {expected}; remove the line, or indent its keys below it"
    return said + ("; put it in quotes" if expected == "text" and not isinstance(given, dict | list) else "")


def _explain(error: ValidationError, where: str, kind: type[BaseModel]) -> str:
    schema = kind.model_json_schema()
    known = {name for part in [*schema.get("$defs", {}).values(), schema] for name in part.get("properties", {})}
    lines = []
    for e in error.errors():
        # The location also holds the names of a union's members.
        wrong = e["loc"][-1:] if e["type"] == "extra_forbidden" else ()
        path = [str(p) for p in e["loc"][: len(e["loc"]) - len(wrong)] if isinstance(p, int) or p in known]
        key, given = ".".join([*path, *map(str, wrong)]), e["input"]
        if e["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(wrong[0]), known, n=1)
            hint = "it is in the wrong section" if wrong[0] in known else f"did you mean '{near[0]}'?" if near else ""
            lines.append(f"unknown key '{key}'" + (f"; {hint}" if hint else ""))
        elif e["type"] in ("literal_error", "union_tag_invalid"):
            expected = e["ctx"].get("expected") or e["ctx"].get("expected_tags")
            given = given.get("method") if isinstance(given, dict) else given
            choices = [w.strip("' ") for w in expected.replace(" or ", ",").split(",")]
            near = difflib.get_close_matches(str(given), choices, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            lines.append(f"'{key}' is {given!r}, expected {expected}{hint}")
        elif e["type"] in ("missing", "union_tag_not_found"):
            lines.append(f"'{key}{'.method' if e['type'] != 'missing' else ''}' is missing")
        elif e["type"] in EXPECTED:
            lines.append(f"'{key}' {_wrong_type(given, EXPECTED[e['type']])}")
        elif e["type"] == "string_pattern_mismatch":
            lines.append(f"'{key}' is {repr(given)[:60]}, expected {PATTERNS[e['ctx']['pattern']]}")
        elif e["type"] == "too_short":
            lines.append(f"'{key}' is an empty list; write at least one value, or remove the line")
        else:
            said = e["msg"].removeprefix("Value error, ")
            said = said if isinstance(given, dict) else f"is {repr(given)[:60]}: {said[0].lower() + said[1:]}"
            lines.append(f"'{key}' {said}" if key else said)
    return "\n".join(f"{where}: {line}".replace("\n", "\\n") for line in lines)  # keys and values may hold one


def validate(kind: type[BaseModel], values: dict, where: str):
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise StudyError(_explain(error, where, kind)) from None


# Plain scalars by the tag that YAML 1.1 gives them: what may stand, and what is said of the rest.
SCALARS = {
    "int": (r"[-+]?(0|[1-9][0-9_]*)", "is no decimal number; write one, or put the text in quotes"),
    "float": (r"[-+]?[0-9]+\.[0-9]*([eE][-+]?[0-9]+)?", "is no plain decimal number; write one, such as 0.5"),
    "bool": (r"(?i)true|false", "would be read as true or false; write true, false, or the text in quotes"),
    "null": (r"~|(?i:null)", "has no value; remove the line or indent its keys below it; null says none"),
    "timestamp": (r"", "would be read as a date; put the text in quotes"),
    "str": (r"(?s).*", ""),
}


def _check_node(node: yaml.Node, key: str = "(file)", seen: tuple = ()) -> None:
    """Raises ValueError, with the line, for what YAML silently changes: a key given twice, yes, 0256, a date, a tag."""
    where = f"line {node.start_mark.line + 1}: '{key}'"
    if isinstance(node, yaml.ScalarNode):
        tag = node.tag.rpartition(":")[2]
        if tag not in SCALARS:
            raise ValueError(f"{where}: the tag {node.tag} is not used here")
        if not re.fullmatch(SCALARS[tag][0], node.value):
            raise ValueError(f"{where} {'is ' + repr(node.value) + ', which ' if node.value else ''}{SCALARS[tag][1]}")
    if len(seen) > 20 or id(node) in seen:
        raise ValueError(f"{where} is nested too deeply")
    keys = set()
    for part in node.value if not isinstance(node, yaml.ScalarNode) else []:
        name, value = part if isinstance(node, yaml.MappingNode) else (None, part)
        if name is not None:
            if name.tag != "tag:yaml.org,2002:str":
                raise ValueError(
                    f"line {name.start_mark.line + 1}: the key {name.value!r} is not text: put it in quotes"
                )
            if name.value in keys:
                raise ValueError(f"line {name.start_mark.line + 1}: the key '{name.value}' stands twice; remove one")
            keys.add(name.value)
        _check_node(value, name.value if name is not None else key, (*seen, id(node)))


def read(path: Path) -> dict:
    """A YAML file's mapping. Raises StudyError if it is missing, malformed or misleading."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if "&" in text and any(isinstance(t, yaml.AliasToken) for t in yaml.scan(text, Loader=yaml.SafeLoader)):
            raise ValueError("aliases (*name) are not used here; write the value again")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise ValueError("expected keys and values")
        _check_node(node)
        return yaml.safe_load(text)
    except FileNotFoundError:
        raise StudyError(f"{path}: there is no such file") from None
    except UnicodeDecodeError:
        raise StudyError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        said = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise StudyError(f"{path}{f', line {mark.line + 1}' if mark else ''}: not YAML: {said}") from None
    except RecursionError:
        raise StudyError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise StudyError(f"{path}: {error}".replace("\n", "\\n")) from None  # a key or a tag may hold one
