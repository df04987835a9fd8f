#!/usr/bin/env python3
"""Whether .github/TROUBLESHOOTING.md has a row for every message of plexctl.py.

Reads plexctl.py as a syntax tree: what it reports, and what its errors say, with `...` for what varies. That
the rows have no message that there is not is a test. Python 3.8 or later.
"""
import ast
import os
import re
import sys

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, HERE)

import plexctl

TELL = ("tell_once", "_warn_once", "warn_once", "_notice", "fail")  # functions that are given a message
REPORT = ("report", "_report")  # these are given other lines as well
UNSEEN = ("parse_json", "unique", "bounded", "parse_time")  # what these raise never gets as far as stderr


def read(name):
    """The text of a file of the repository."""
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        return file.read()


def literal(node):
    """The text of a string in the syntax tree; None for anything else."""
    value = getattr(node, "value", None)
    return value if isinstance(value, str) else None


def written_texts(node):
    """What an expression may give, with %s for whatever is put together."""
    if literal(node) is not None:
        return [literal(node)]
    if isinstance(node, ast.JoinedStr):
        return ["".join(literal(part) or "%s" for part in node.values)]
    if isinstance(node, ast.IfExp):
        return written_texts(node.body) + written_texts(node.orelse)
    if isinstance(node, ast.BinOp):
        return [left + right for left in written_texts(node.left) for right in written_texts(node.right)]
    return ["%s"]


def shortened(text):
    """A message as the page writes it: `...` for what varies, no `warning: ` or `error: ` before it."""
    text = re.sub("(?:%[-.0-9]*[a-z]|[.]{3})+", "...", text)
    return re.sub("^(?:warning|error): ", "", text)


def messages_of(tree):
    """What plexctl.py may say to an operator, shortened: (line, text)."""
    errors = {name for name, value in vars(plexctl).items()
              if isinstance(value, type) and issubclass(value, plexctl.PlexctlError)}
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        raised = errors if function.name in UNSEEN else errors | {"ValueError"}
        for call in [node for node in ast.walk(function) if isinstance(node, ast.Call) and node.args]:
            name = getattr(call.func, "id", getattr(call.func, "attr", ""))
            for text in written_texts(call.args[0]):
                told = name in TELL or name in REPORT and text.startswith(("warning: ", "error: "))
                if function.name in ("error", "parse_arguments", "convert_values", "check_together"):
                    text += " (see plexctl --help)"  # see parse_arguments
                text = shortened(text)
                if (told or name in raised) and len(re.sub("[^a-z]", "", text)) > 6:
                    yield call.lineno, text


def main():
    messages = set(messages_of(ast.parse(read("plexctl.py"))))
    rows = re.findall(r"(?m)^\| (`.*?) \| .* \|$", read(".github/TROUBLESHOOTING.md"))
    spans = [shortened(span) for row in rows for span in re.findall("`([^`]+)`", row)]
    known = [re.compile(".*".join(map(re.escape, span.split("...")))) for span in spans]
    missing = sorted((line, text) for line, text in messages
                     if not any(each.fullmatch(text) or each.fullmatch("...: " + text) for each in known))
    for line, text in missing:
        print("plexctl.py:%d: .github/TROUBLESHOOTING.md has no row for: %s" % (line, text))
    print("%d messages, of which %d have no row" % (len(messages), len(missing)))
    return 1 if missing or len(messages) < 80 else 0


if __name__ == "__main__":
    sys.exit(main())
