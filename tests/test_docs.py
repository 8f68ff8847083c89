"""What the documents show runs as it stands: the README's example, the guides, the notebook."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from cllip_fast import cli
from cllip_fast.interchange import export
from cllip_fast.models import CllipModel
from cllip_fast.train import config
from tests.interchange.peers import EOT, randomize, small_model
from tests.saved_run import picture, save_run

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = {  # options of other programs that the documents name
    *("--max-restarts", "--standalone"),  # torchrun
    "--signal",  # Slurm
    "--benchmark-only",  # pytest-benchmark
    *("--local-loss", "--gather-with-grad"),  # OpenCLIP
    *("--amd", "--date", "--write"),  # tests.kernels.ahead_of_time
    *("--output_format", "--save_additional_columns", "--resize_mode"),  # img2dataset
}


def run_examples(path: Path, names: dict[str, object]) -> dict[str, object]:
    """Run the Python blocks of a document, one after the other, in one namespace."""
    examples = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    assert examples, f"{path} has no examples"
    for example in examples:
        exec(compile(example, str(path), "exec"), names)
    return names


def test_no_example_is_left_out() -> None:
    """Each document with Python in it has a test below."""
    shown = {path.name for path in DOCUMENTS if "```python" in path.read_text()}
    assert shown == {"README.md", "adding_a_loss.md", "interchange.md", "use.md"}


def test_the_readme_example_has_gradients() -> None:
    def features(*shape: int) -> torch.Tensor:
        return normalize(torch.randn(*shape), dim=-1).requires_grad_()

    names = {
        "image_features": features(6, 8),
        "text_features": features(6, 8),
        "region_features": features(6, 3, 8),
        "region_text_features": features(6, 3, 8),
        "patch_features": features(6, 9, 8),
        "logit_scale": torch.tensor(10.0, requires_grad=True),
        "mask": torch.rand(6, 3) > 0.3,
    }
    leaves = [value for value in names.values() if value.requires_grad]
    run_examples(ROOT / "README.md", names)["loss"].backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


def test_using_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_run(tmp_path).rename(tmp_path / "runs" / "scenes")
    picture(320, 240, seed=1).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = run_examples(ROOT / "docs" / "use.md", {})
    assert names["maps"].shape == (1, 240, 320)
    assert [len(names["first"]), len(names["second"])] == [2, 1]
    assert names["prefix"].shape == (2, 16, 4096)
    names["prefix"].sum().backward()
    assert names["total"].isfinite()


def test_weights_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's ViT-L/14 with the sizes of the tests' small towers."""
    theirs, asked = small_model("ViT-L-14-quickgelu"), {}
    randomize(theirs)
    export(theirs, tmp_path / "clip-vit-large-patch14-336", "hf", end_id=EOT)

    def small(name: str, **options: object) -> CllipModel:
        asked.update(options, name=name)
        return small_model(name, attention=options["attention"])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cllip_fast.models.create_model", small)
    loaded = run_examples(ROOT / "docs" / "interchange.md", {})["model"]
    assert asked == {"name": "ViT-L-14-quickgelu", "image_size": 336, "attention": "sdpa"}
    torch.testing.assert_close(loaded.logit_scale, theirs.logit_scale)


def test_adding_a_loss() -> None:
    names = run_examples(ROOT / "docs" / "adding_a_loss.md", {})
    assert names["ours"].item() == pytest.approx(names["theirs"].item())


def test_the_tour(tmp_path: Path) -> None:
    """The notebook's cells in their order, with few steps, in a process of their own: it trains and sets signals."""
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    script = tmp_path / "tour.py"
    script.write_text(code)
    environment = os.environ | {"CLLIP_TOUR_STEPS": "4", "MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "found.png").stat().st_size > 1000


def test_the_tour_shows_what_a_reader_would_get() -> None:
    """Outputs of one run of all cells in their order, with pictures, without an error or a machine's paths."""
    cells = [cell for cell in json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"] if "outputs" in cell]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "execute_result"}
    assert sum(any(kind.startswith("image/") for kind in output.get("data", {})) for output in outputs) == 3
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert "step 1000/1000 100%" in text
    assert not re.search(r"(?<![\w.])/(root|tmp|home|work)/", text)


def shell_commands(path: Path) -> list[list[str]]:
    """The commands of a document's shell blocks, as words; what is fed to one (<<) is left out."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL)).replace("\\\n", " ")
    blocks = re.sub(r"<<'(\w+)'\n.*?\n\1\n", "\n", blocks, flags=re.DOTALL)
    words = [shlex.split(line, comments=True) for line in blocks.splitlines()]
    return [[word for word in line if word != "..."] for line in words if line]


def anchors(path: Path) -> set[str]:
    """The headings of a document, as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_understood(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command that is shown has only options that exist, with values that they take."""
    monkeypatch.chdir(ROOT)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in shell_commands(path):
        scripts = [word for word in words if word.endswith(".py")]
        assert all(Path(script).is_file() for script in scripts), words
        if "train/main.py" in words:
            config.parse(words[words.index("train/main.py") + 1 :])
        elif "cllip_fast.cli" in words:
            cli.create_parser().parse_args(words[words.index("cllip_fast.cli") + 1 :])
        elif words[0] == "cllip-fast":
            cli.create_parser().parse_args(words[1:])
        elif words[0] == "make":
            assert words[1] in targets, words


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", path.read_text()):
        name, _, anchor = link.partition("#")
        target = (path.parent / name) if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """The options of a parser and of its subcommands."""
    found = {option for action in parser._actions for option in action.option_strings}
    below = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return found.union(*(options_of(each) for choices in below for each in choices.values()))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_options_that_are_named_exist(path: Path) -> None:
    known = {config.flag(field.name) for field in dataclasses.fields(config.Config)} | {"--config", "--help"}
    known |= options_of(cli.create_parser()) | OTHERS
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL))
    named = re.findall(r"(?<![\w-])--[a-z][\w-]*", " ".join(spans))
    assert not set(named) - known
