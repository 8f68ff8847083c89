"""The native CPU kernels: against plain PyTorch and fp64, every instruction set, 1 and 2 threads; and their absence."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cllip_fast.errors import InputError
from cllip_fast.kernels import native
from cllip_fast.kernels.block import Block, Workspace
from cllip_fast.kernels.info_nce import native as native_info_nce
from cllip_fast.kernels.info_nce import tiles as tiles_info_nce
from cllip_fast.kernels.sigmoid import native as native_sigmoid
from cllip_fast.kernels.sigmoid import tiles as tiles_sigmoid
from cllip_fast.losses import ClipLoss, RegionTextLoss, SigLipLoss
from cllip_fast.streaming.backends import kernels
from tests import dense

built = pytest.mark.skipif(not native.available(), reason=native.describe())
SETS = native.instruction_sets() if native.available() else native.INSTRUCTION_SETS
SIZES = [1, 17, 123, 507]
INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=SETS)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(native.INSTRUCTION_SET_VARIABLE, request.param)
    return request.param


def apply(values: Tensor, function: int) -> Tensor:
    result = values.clone()
    index = native.INSTRUCTION_SETS.index(native.instruction_set())
    assert native._library().cllip_apply(result.data_ptr(), result.numel(), function, index) == 0
    return result


def ulps(found: Tensor, exact: Tensor) -> float:
    spacing = torch.from_numpy(np.spacing(exact.float().numpy())).double()
    return ((found.double() - exact) / spacing).abs().max().item()


@built
@pytest.mark.usefixtures("instructions")
def test_exponential_and_logarithm() -> None:
    x = torch.cat([torch.linspace(-87.32, 88.36, 300_001), torch.linspace(-1, 1, 100_000)])
    assert ulps(apply(x, 0), x.double().exp()) <= 1.1
    y = torch.cat([torch.linspace(0, 1, 100_001), torch.logspace(-37, 0, 50_000)])
    assert ulps(apply(y, 1), y.double().log1p()) <= 2.0
    special = torch.tensor([-INF, -1e38, -1e4, -88.0, -0.0, 0.0, 88.5, 1e38, INF, NAN])
    assert apply(special, 0).tolist()[:-1] == [0, 0, 0, 0, 1, 1, INF, INF, INF]
    assert apply(special, 0)[-1].isnan()


@built
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("rows", SIZES)
def test_info_nce_tiles(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running statistics and gradients of two chunks with every kind of exclusion, tiles that are not full."""
    monkeypatch.setattr("cllip_fast.kernels.block.TILE_ELEMENTS", 100_000)
    x, y = dense.features(rows, 24)
    y[rows - rows // 2 :] = y[: rows // 2].clone()
    ids = torch.arange(rows) % 50
    valid = torch.arange(rows) % 7 != 3
    weights = torch.linspace(0.5, 1, rows, dtype=torch.float64) * valid
    for size in (0.01, 14.3, 100.0, 1000.0):
        exact = walk(tiles_info_nce, x, y, size, ids, valid, weights)
        plain = walk(tiles_info_nce, x.float(), y.float(), size, ids, valid, weights)
        ours = walk(native_info_nce, x.float(), y.float(), size, ids, valid, weights)
        for name, want, peer, have in zip(("rows", "columns", "d_rows", "d_columns"), exact, plain, ours, strict=True):
            error, theirs = (have - want).norm(), (peer - want).norm()
            # Softmax and log-sum-exp are known to about an ulp of 1, whatever is left after the positives.
            allowed = (3 if name.startswith("d_") else 2) * theirs + 2e-7 * rows**0.5
            assert error <= allowed, (name, size, error, theirs)


def walk(
    kernel: object, x: Tensor, y: Tensor, size: float, ids: Tensor, valid: Tensor, weights: Tensor
) -> list[Tensor]:
    """[log-sum-exps of rows, of columns, d_rows, d_columns] in fp64; the columns go in two chunks."""
    scale, middle = x.new_tensor(size), len(x) // 3
    statistics = kernel.RowStatistics.start(len(x), scale)
    chunks, tops, totals = [slice(0, middle), slice(middle, len(x))], [], []
    space = Workspace(len(x), len(x), scale)

    def block(chunk: slice) -> Block:
        run = (chunk.start, 0, chunk.stop - chunk.start)
        masks = {"row_valid": valid, "column_valid": valid[chunk], "row_ids": ids, "column_ids": ids[chunk]}
        return Block(run, **masks, row_texts=y, threshold=0.9)

    for chunk in chunks:
        if chunk.stop > chunk.start:
            top, total = kernel.forward_block(x, y[chunk], scale, block(chunk), statistics, space)
            tops.append(top)
            totals.append(total)
    top, total = torch.cat(tops), torch.cat(totals)
    row_lse, column_lse = (
        m.double() + t.double().log() for m, t in ((statistics.maximum, statistics.total), (top, total))
    )
    weights = weights.to(x.dtype)
    filled = [each.masked_fill(~valid, 1) for each in (statistics.total, total)]
    row_values = torch.stack([statistics.maximum, weights / filled[0], weights])
    column_values = torch.stack([top, weights / filled[1], weights])
    d_rows, d_columns = torch.zeros_like(x), torch.zeros_like(y)
    small = row_lse[valid].abs().max() < 40 and column_lse[valid].abs().max() < 40
    for chunk in chunks:
        if chunk.stop > chunk.start:
            arguments = (
                x,
                y[chunk],
                scale,
                block(chunk),
                row_values,
                column_values[:, chunk],
                d_rows,
                d_columns[chunk],
            )
            kernel.backward_block(*arguments, space, reference=3.0 if small else None)
    return [row_lse[valid], column_lse[valid], d_rows.double(), d_columns.double()]


@built
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize(("low", "high"), [(-1, 1), (-65, 65), (-210, -150), (150, 210), (-300, 300), (-1e6, 1e6)])
def test_sums_of_scores_in_any_range(low: float, high: float) -> None:
    """One exponential against a shared reference or two, over two tiles; a row and a column without any pair."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(46, 37, generator=generator) * (high - low) + low
    scores[20:, 3] = low - 500
    row_max, row_total, positive = torch.zeros(3, 23)
    column_max, column_total = torch.zeros(2, 37)
    real_rows, real_columns = torch.arange(46) != 5, torch.arange(37) != 7
    for tile, real in zip(scores.split(23), real_rows.split(23), strict=True):
        block = Block((0, 0, 0), row_valid=real, column_valid=real_columns)
        row_max.zero_(), row_total.zero_()
        sums = row_max, row_total, positive, column_max, column_total
        native.call("info_nce_forward", tile, torch.eye(37), torch.tensor(1.0), block, *sums)
    scores[~real_rows] = scores[:, ~real_columns] = -INF
    for top, total, part in ((row_max, row_total, scores[23:].t()), (column_max, column_total, scores)):
        exact = part.double().logsumexp(0)
        assert ((total == 0) == (exact == -INF)).all()
        found = torch.where(total == 0, -INF, top.double() + total.double().log())
        torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-6)


@built
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("split", [False, True])
def test_info_nce_parts_of_rows_and_columns(split: bool) -> None:
    """Of several ranks' partial gradients: the two softmaxes apart, and the rows' part of the scale's gradient."""
    x, y = dense.features(211, 16)
    values = torch.stack([torch.full((211,), 2.0), torch.linspace(0.01, 0.02, 211), torch.linspace(1, 2, 211)])
    results = []
    for kernel, dtype in ((tiles_info_nce, torch.float64), (native_info_nce, torch.float32)):
        rows, columns, of_rows = x.to(dtype), y.to(dtype), values.to(dtype)
        d_rows, d_columns, part = torch.zeros_like(rows), torch.zeros_like(columns), rows.new_zeros(211)
        block, space = Block((3, 5, 200)), Workspace(211, 211, rows)
        row_part = None if split else part
        arguments = (rows, columns, rows.new_tensor(9.0), block, of_rows, of_rows.flip(1), d_rows, d_columns, space)
        kernel.backward_block(*arguments, reference=None, split=split, row_part=row_part)
        results.append((d_rows, d_columns, part))
    for want, have in zip(*results, strict=True):
        torch.testing.assert_close(have.double(), want, rtol=1e-5, atol=1e-5)


@built
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("rows", SIZES)
def test_sigmoid_tiles(rows: int) -> None:
    x, y = dense.features(rows, 24)
    block = Block((0, 0, rows), column_valid=torch.arange(rows) % 5 != 4)
    for size, offset in ((10.0, -10.0), (0.01, 0.0), (300.0, 40.0), (10.0, None)):
        results = []
        for kernel, dtype in (
            (tiles_sigmoid, torch.float64),
            (tiles_sigmoid, torch.float32),
            (native_sigmoid, torch.float32),
        ):
            features, scale = (x.to(dtype), y.to(dtype)), torch.tensor(size, dtype=dtype)
            bias = None if offset is None else torch.tensor(offset, dtype=dtype)
            gradients = [torch.zeros(shape, dtype=dtype) for shape in (x.shape, y.shape, ())]
            space = Workspace(rows, rows, scale)
            loss = kernel.forward_block(*features, scale, bias, block, space)
            kernel.backward_block(*features, scale, bias, block, *gradients, space)
            results.append([each.double() for each in (loss, *gradients)])
        for want, peer, have in zip(*results, strict=True):
            assert (have - want).norm() <= 2 * (peer - want).norm() + 3e-7 * want.norm(), (size, offset)


@built
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("size", [0.001, 30.0, 100.0, 10_000.0])
def test_losses_on_adversarial_features(size: float) -> None:
    """A row opposite to all texts, identical rows, one-hot matches: nearly as exact as plain PyTorch."""
    x, y = dense.features(67, 32)
    x[0] = -y.mean(0) / y.mean(0).norm()
    x[1:20] = x[1]
    x[20:40] = y[20:40]
    inputs = [x, y, torch.tensor(size, dtype=torch.float64)]
    value, gradients = dense.value_and_gradients(dense.clip, inputs)
    single = [each.float() for each in inputs]
    plain = dense.value_and_gradients(dense.clip, single)
    ours = dense.value_and_gradients(ClipLoss(backend="native", chunk_size=19), single)
    assert (ours[0] - value).abs() <= 2 * (plain[0] - value).abs() + 1e-6 * value
    for want, peer, have in zip(gradients, plain[1], ours[1], strict=True):
        assert (have - want).norm() <= 3 * (peer - want).norm() + 1e-6 * want.norm() + 1e-7


@built
@pytest.mark.usefixtures("instructions")
def test_nan_and_overflow_reach_the_loss() -> None:
    x, y = dense.features(150, 8, torch.float32)
    for bad in (NAN, INF, 3e38):
        features = x.clone()
        features[77] = bad
        value, gradients = dense.value_and_gradients(ClipLoss(backend="native"), [features, y, torch.tensor(9.0)])
        assert value.isnan() or value.isinf()
        assert gradients[1].isnan().any()
        assert not SigLipLoss(backend="native")(features, y, torch.tensor(9.0)).isfinite()
    huge = ClipLoss(backend="native")(x * 1e4, y * 1e4, torch.tensor(100.0))
    torch.testing.assert_close(huge, dense.clip(x.double() * 1e4, y.double() * 1e4, torch.tensor(100.0)).float())


@built
@pytest.mark.usefixtures("instructions")
def test_threads_and_same_bits_again() -> None:
    x, y = dense.features(507, 16, torch.float32)
    inputs = [x, y, torch.tensor(20.0)]
    before = torch.get_num_threads()
    for loss in (ClipLoss(backend="native"), RegionTextLoss(backend="native"), SigLipLoss(backend="native")):
        results = []
        try:
            for threads in (1, 1, 2, 2):
                torch.set_num_threads(threads)
                value, gradients = dense.value_and_gradients(loss, inputs)
                results.append([value, *gradients])
        finally:
            torch.set_num_threads(before)
        for one, again, two, two_again in zip(*results, strict=True):
            assert torch.equal(one, again)
            assert torch.equal(two, two_again)
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@built
def test_choice_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels("auto", "info_nce", torch.device("cpu")) is native_info_nce
    assert kernels("auto", "sigmoid", torch.device("cpu")) is native_sigmoid
    assert kernels("auto", "info_nce", torch.device("cuda")) is not native_info_nce
    assert kernels("native", "info_nce") is native_info_nce
    x, y = dense.features(300, 8)
    with pytest.raises(InputError, match="'native', which runs on the CPU only, but the features are on meta"):
        native.runs(x.to("meta"))
    inputs = [x, y, torch.tensor(10.0, dtype=torch.float64)]  # fp64 has no native kernels
    torch.testing.assert_close(ClipLoss(backend="native")(*inputs), dense.clip(*inputs), rtol=1e-13, atol=0)
    half = [each.bfloat16() for each in inputs]  # computed in fp32
    expected = dense.clip(*(each.double() for each in half))
    torch.testing.assert_close(ClipLoss(backend="native")(*half).double(), expected, rtol=1e-2, atol=0)
    assert native.describe().startswith(f"native kernels: {SETS[-1]}, ")
    monkeypatch.setenv(native.INSTRUCTION_SET_VARIABLE, "sse9")
    with pytest.raises(InputError, match="CLLIP_INSTRUCTION_SET is 'sse9', expected one of portable"):
        native.describe()


@built
def test_operator_is_traceable() -> None:
    x, y = (each.requires_grad_() for each in dense.features(9, 4, torch.float32))
    arguments = (x, y, torch.tensor(5.0), None, None, None, "", False, True, 0, "native", True)
    torch.library.opcheck(torch.ops.cllip_fast.info_nce.default, arguments)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libcllip_native.so")
    assert not native.available()
    assert native.describe().startswith("native kernels: not built (no libcllip_native.so in ")
    with pytest.raises(
        InputError, match="backend is 'native', but the native kernels are not built: no libcllip_native"
    ):
        ClipLoss(backend="native")
    x, y = dense.features(300, 8, torch.float32)
    with pytest.raises(InputError, match="are not built"):
        native.runs(x)
    assert kernels("auto", "info_nce", x.device) is tiles_info_nce
    expected = dense.clip(x.double(), y.double(), torch.tensor(10.0)).float()
    torch.testing.assert_close(ClipLoss()(x, y, torch.tensor(10.0)), expected)
    native.LIBRARY.write_text("not a library")
    native._load.cache_clear()
    with pytest.raises(InputError, match="cannot be loaded"):
        native.check_available()
    native._load.cache_clear()


@built
def test_library_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    native._load.cache_clear()
    monkeypatch.setattr(native, "ABI_VERSION", 999)
    assert "has interface version 4, this package needs 999: install it again" in native.describe()
    native._load.cache_clear()


def test_header_and_loader_agree() -> None:
    header = Path(native.__file__).parent.joinpath("csrc", "cllip_native.h").read_text()
    assert f"#define CLLIP_ABI_VERSION {native.ABI_VERSION}\n" in header
    assert ctypes.sizeof(native._Exclusions) == 88
    assert ctypes.sizeof(native._Block) == 168
    assert ctypes.sizeof(native._Patches) == 96


@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="setuptools is not installed")
def test_installation_without_a_compiler(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"CXX": str(tmp_path / "no-such-compiler")}
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path),
    ]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("cllip-fast: native kernels not built, CPU losses will run on plain PyTorch: ") == 1
    assert not list(tmp_path.rglob("*.so"))
