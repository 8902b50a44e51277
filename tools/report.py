"""RUN.jsonl to one HTML page: what a run did, in plots that need no network to be looked at.

    python tools/report.py run.jsonl                 # writes run.html
    python tools/report.py run.jsonl -o page.html --title "7B, TP 8"

The page holds its style and its plots (SVG) in itself, loads nothing and runs no script. A run that was killed and
resumed has written some iterations twice: the later ones count, and the page says how many there were. A last line that
a killed run left half written is left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

from _cli import ArgumentParser, run, write_atomically
from _report_page import page
from _report_records import read_run


def main() -> None:
    """Parse the flags, read, draw, write."""
    parser = ArgumentParser(description="One self-contained HTML page about a run, from its --geoscale-log-jsonl.")
    parser.add_argument("run", type=Path, metavar="RUN.jsonl")
    parser.add_argument("-o", "--output", type=Path, metavar="PAGE.html", help="default: beside the JSONL")
    parser.add_argument("--title", help="default: the file's name")
    args = parser.parse_args()
    output = args.output or args.run.with_suffix(".html")
    if output == args.run:
        raise ValueError(f"--output {output} is the run itself")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("tools/report.py draws with matplotlib: pip install megatron-geoscale[plot]") from None
    write_atomically(output, page(read_run(args.run), args.title or args.run.name).encode())
    print(output)


if __name__ == "__main__":
    sys.exit(run(main))
