"""Misspelt options: one line, with what was probably meant, from the subcommand's own options."""

from __future__ import annotations

import pytest

from cllip_fast.cli import main
from cllip_fast.train.config import parse


@pytest.mark.parametrize(
    ("run", "arguments", "line"),
    [
        (parse, ["--bath-size", "3"], "error: unrecognized arguments: --bath-size 3; did you mean --batch-size?"),
        (parse, ["--qqqq"], "error: unrecognized arguments: --qqqq ("),
        (parse, ["--steps", "many"], "error: argument --steps: invalid int value: 'many'"),
        (main, ["plan", "--modle=tiny"], "plan: error: unrecognized arguments: --modle=tiny; did you mean --model?"),
        (main, ["shards", "check", "x", "--jsonn", "f"], "unrecognized arguments: --jsonn f; did you mean --json?"),
    ],
)
def test_one_line_with_a_suggestion(run, arguments: list[str], line: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        run(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert line in said
    assert said.count("\n") == 1
