"""The tuning tables: which row a launch takes, and what CLLIP_AUTOTUNE=1 does, with an injected clock."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch

from cllip_fast.errors import InputError
from cllip_fast.kernels import tuning
from cllip_fast.kernels.tuning import LARGE, SMALL, Table


class Config(NamedTuple):
    rows: int
    warps: int = 4


TABLE = Table(
    "example",
    {
        (0, LARGE, "half"): Config(1),
        (80, LARGE, "half"): Config(128),
        (80, SMALL, "half"): Config(32),
        (90, LARGE, "half"): Config(256),
        (80, LARGE, "full"): Config(64),
    },
    {(80, "half"): (Config(128), Config(128, 8)), (90, "half"): (Config(512),)},
)


@pytest.mark.parametrize(
    ("capability", "size", "kind", "rows"),
    [
        (80, LARGE, "half", 128),
        (80, SMALL, "half", 32),
        (89, SMALL, "half", 32),
        (90, SMALL, "half", 256),  # no small row of its own: the architecture matters more than the size
        (120, LARGE, "half", 256),
        (90, LARGE, "full", 64),
        (0, SMALL, "half", 1),
    ],
)
def test_the_nearest_lower_row(capability: int, size: str, kind: str, rows: int) -> None:
    assert TABLE.row(capability, size, kind).rows == rows


def test_what_a_search_tries() -> None:
    assert TABLE.tried(86, LARGE, "half") == [Config(128), Config(128, 8)]
    assert TABLE.tried(100, LARGE, "half") == [Config(256), Config(512)]
    assert TABLE.tried(90, LARGE, "full") == [Config(64)]


@pytest.fixture
def _fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """sm_80 with 100 multiprocessors; no kernel is run on it."""
    monkeypatch.setattr(tuning, "_found", {})
    monkeypatch.setattr(tuning, "capability_of", lambda device: 80)
    monkeypatch.setattr(tuning, "processors", lambda device: 100)
    monkeypatch.setattr(tuning, "median_milliseconds", lambda run: run())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a fake")


@pytest.mark.usefixtures("_fake_gpu")
def test_the_size_class_is_small_where_half_of_the_device_would_idle() -> None:
    for count, rows in ((128 * 49, 32), (128 * 50, 128)):
        chosen = tuning.choose(TABLE, "half", torch.device("cuda"), lambda config, count=count: count // config.rows)
        assert chosen.rows == rows


@pytest.mark.usefixtures("_fake_gpu")
def test_a_search_keeps_and_prints_the_fastest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("CLLIP_AUTOTUNE", "1")
    launched = []

    def launch(config: Config) -> float:
        launched.append(config)
        if config == Config(128):
            raise triton.OutOfResources(300, 200, "shared memory")
        return {Config(32): 2.0, Config(128, 8): 0.5}[config]

    for _ in range(2):
        chosen = tuning.choose(TABLE, "half", torch.device("cuda"), lambda config: 1, launch)
        assert chosen == Config(128, 8)
    assert launched == [Config(32), Config(128), Config(128, 8)]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("# example: 0.5000 ms, a fake")
    assert eval(f"{{{line}\n}}", {"Config": Config}) == {(80, "small", "half"): Config(128, 8)}


@pytest.mark.usefixtures("_fake_gpu")
@pytest.mark.parametrize("why", ["not asked for", "a graph is captured", "on a CPU", "nothing to time"])
def test_without_a_search_it_is_the_table(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLLIP_AUTOTUNE", "0" if why == "not asked for" else "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: why == "a graph is captured")
    device = torch.device("cpu" if why == "on a CPU" else "cuda")
    launch = None if why == "nothing to time" else lambda config: pytest.fail("was run")
    assert tuning.choose(TABLE, "half", device, lambda config: 1, launch) == Config(32)


def test_where_none_can_be_built_the_row_stays(capsys: pytest.CaptureFixture) -> None:
    triton = pytest.importorskip("triton")

    def refuse(config: Config) -> None:
        raise triton.OutOfResources(300, 200, "shared memory")

    found = tuning.search(TABLE, 80, LARGE, "half", refuse, "a fake", lambda run: run() or 0.0)
    assert found == Config(128)
    assert re.search("none could be built", capsys.readouterr().out)


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(InputError, match=r"needs compute capability 8.0 or higher, but cuda:7 has 7.5"):
        tuning.capability_of(torch.device("cuda", 7))


def test_the_tables_are_whole() -> None:
    """Every architecture has every kind, so that none takes another one's rows by accident."""
    pytest.importorskip("triton")
    from cllip_fast.kernels.info_nce import triton_backward, triton_forward
    from cllip_fast.kernels.localize import triton as localize
    from cllip_fast.kernels.patch_text import triton_backward as pool_backward
    from cllip_fast.kernels.patch_text import triton_forward as pool_forward
    from cllip_fast.kernels.sigmoid import triton as sigmoid

    tables = [module.TUNING for module in (triton_forward, triton_backward, localize, sigmoid)]
    for table in (*tables, pool_forward.TILES, pool_backward.TILES, pool_backward.GATHERS):
        kinds = {kind for _, _, kind in table.rows}
        assert {kind for _, kind in table.candidates} <= kinds
        for capability in (0, 80, 90, 100):
            assert {kind for size, kind in table.at(capability) if size == LARGE} == kinds
