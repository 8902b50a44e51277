"""Writes docs/FLAGS.md from the parser of pretrain.py, so that the page cannot say anything else than `--help`.

    python docs/flags.py            # writes the page; a test fails when it is out of date
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from megatron_geoscale.training.arguments import build_parser

PAGE = Path(__file__).with_name("FLAGS.md")
_HEAD = """# Flags of pretrain.py

Made by `python docs/flags.py` from the parser. Names and meanings are Megatron-LM's, but for `--geoscale-*`. A flag
that is not here is refused, not ignored.
"""


def page() -> str:
    """The whole page, in the order of `--help`."""
    sections = [_HEAD]
    for group in build_parser()._action_groups:
        rows = [f"| {_flag(action)} | {_default(action)} | {_help(action)} |" for action in _documented(group)]
        if rows:
            title = (group.title or "").capitalize()
            sections.append("\n".join([f"## {title}", "| flag | default | |", "|---|---|---|", *rows]) + "\n")
    return "\n".join(sections)


def _documented(group: argparse._ArgumentGroup) -> Iterator[argparse.Action]:
    for action in group._group_actions:
        if not isinstance(action, argparse._HelpAction):
            yield action


def _flag(action: argparse.Action) -> str:
    if action.nargs == 0:
        return f"`{action.option_strings[0]}`"
    if action.choices is not None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    else:
        metavar = action.metavar or action.dest.upper()
        value = " ".join(metavar) if isinstance(metavar, tuple) else metavar
    return _escaped(f"`{action.option_strings[0]} {value}`")


def _default(action: argparse.Action) -> str:
    if action.default in (None, "", argparse.SUPPRESS) or action.nargs == 0:
        return ""
    return f"`{action.default}`"


def _help(action: argparse.Action) -> str:
    if action.help == argparse.SUPPRESS:
        return "accepted, without effect: what it asks for happens anyway"
    return _escaped((action.help or "").replace("%%", "%"))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
