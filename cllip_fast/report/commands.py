"""`cllip-fast report`: a run as one page."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `report` to the command line."""
    parser = commands.add_parser("report", help="write a run's page", description=_report.__doc__)
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of a run, such as runs/scenes")
    parser.add_argument("--out", type=Path, metavar="HTML", help="the page to write (default: report.html in the run)")
    parser.add_argument(
        "--samples",
        type=int,
        default=200,
        metavar="N",
        help="first samples of each split to look for failures in (default %(default)s)",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    """Write curves, metrics, pictures, failures and the Prompter's attention of a run as one page without a network."""
    from cllip_fast.report.page import write_report

    out = options.out or options.folder / "report.html"
    for note in write_report(options.folder, out, samples=options.samples, device=options.device):
        print(note)
    print(f"wrote {out}")
