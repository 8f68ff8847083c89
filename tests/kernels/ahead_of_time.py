"""Compile the Triton kernels ahead of time, without a GPU, and hold what comes out against a budget.

    python -m tests.kernels.ahead_of_time                                     # every case of every operation: minutes
    python -m tests.kernels.ahead_of_time --operation info_nce --capability 90 --name "bf16 D512"
    python -m tests.kernels.ahead_of_time --amd --date 2026-01-31 --write docs/kernels_budget.md

Budget: no spills, at most 255 registers, no more shared memory than a block can have; for kernels with a product of
half types tensor-core instructions (wgmma on sm_90); for kernels with a product and num_stages > 1 a software pipeline,
that is asynchronous copies. AMD's gfx942 is compiled as far as it compiles: reported, never required.

A process that has compiled keeps Triton and its compilers in memory, so that the work is done by processes of their
own; what Triton has compiled before comes from its cache.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from cllip_fast.kernels.tuning import CompileCase

OPERATIONS = ("info_nce", "sigmoid", "patch_text", "localize")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Compute capability -> bytes of shared memory that a block can have (CUDA C++ Programming Guide, table 30)."""
MAX_REGISTERS = 255
AMD = "gfx942"

_TENSOR_CORES = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
_COPIES = {"TMA": "cp.async.bulk.tensor", "cp.async": r"cp\.async\.c[ag]"}


@dataclass(frozen=True)
class Built:
    """A case as it was compiled for one target.

    Attributes:
        operation, name: the case's.
        target: "sm_90" or "gfx942".
        registers: of a thread.
        local: bytes of a thread's local memory, where registers are spilled to.
        shared: bytes of a block.
        tensor_cores: kind of tensor-core instruction: "wgmma", "tcgen05", "mma", "mfma"; "" if there is none.
        copies: kind of asynchronous copy: "TMA", "cp.async"; "" if there is none.
        broken: what breaks the budget.
    """

    operation: str
    name: str
    target: str
    registers: int = 0
    local: int = 0
    shared: int = 0
    tensor_cores: str = ""
    copies: str = ""
    broken: tuple[str, ...] = ()


def operations() -> list[str]:
    """The operations that have Triton kernels."""
    return [each for each in OPERATIONS if importlib.util.find_spec(f"cllip_fast.kernels.{each}.triton")]


def cases(operation: str, capability: int, pattern: str = "") -> Iterator[CompileCase]:
    """The operation's cases for a compute capability whose name matches a regular expression."""
    module = importlib.import_module(f"cllip_fast.kernels.{operation}.triton")
    return (case for case in module.compile_cases(capability) if re.search(pattern, case.name))


def is_default(name: str) -> bool:
    """Whether a case is in the short selection: bf16, D = 512, every configuration with all masks it is for."""
    fewer_masks = r"padded filtered$|^patch_text (max|softmax) (?!.*masked$)"
    return not re.search(rf"\b(fp16|fp32)\b|\bD(?!512\b)\d+|{fewer_masks}", name)


def compiled(case: CompileCase, backend: str, architecture: int | str) -> Any:
    """Triton's `CompiledKernel` of a case, compiled as its launch would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    unknown = ({*case.signature} | {*case.constants} | {*case.divisible_by_16}) - {*names}
    missing = {*names} - {*case.signature} - {*case.constants}
    if unknown or missing:
        raise ValueError(f"case {case.name!r}: arguments unknown {sorted(unknown)}, missing {sorted(missing)}")
    source = ASTSource(
        case.kernel,
        {name: "constexpr" if name in case.constants else case.signature[name] for name in names},
        dict(case.constants),
        {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible_by_16},
    )
    target = GPUTarget(backend, architecture, 32 if backend == "cuda" else 64)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    with contextlib.redirect_stdout(io.StringIO()):  # of a failure Triton prints the whole assembly
        return triton.compile(source, target=target, options=options)


def with_ones(case: CompileCase) -> CompileCase:
    """The case as it is launched where every integer is 1 that Triton then takes for a constant, not for a tensor."""
    looked_at = {each.name for each in case.kernel.params if not each.do_not_specialize}
    ones = {name for name, kind in case.signature.items() if kind in ("i32", "i64") and name in looked_at}
    return dataclasses.replace(
        case,
        name=f"{case.name} of ones",
        signature={name: kind for name, kind in case.signature.items() if name not in ones},
        constants={**case.constants, **dict.fromkeys(ones, 1)},
        divisible_by_16=tuple(name for name in case.divisible_by_16 if name not in ones),
    )


def build_nvidia(operation: str, case: CompileCase, capability: int) -> Built:
    """Compile for an NVIDIA architecture; what cannot be compiled is a broken budget."""
    target = f"sm_{capability}"
    try:
        kernel = compiled(case, "cuda", capability)
    except Exception as error:  # the compiler's own errors have no common type
        return Built(operation, case.name, target, broken=(f"does not compile: {_reason(error)}",))
    usage = _resource_usage(kernel.asm["cubin"])
    tensor_cores = _first(_TENSOR_CORES, kernel.asm["ptx"])
    copies = _first(_COPIES, kernel.asm["ptx"])
    shared = kernel.metadata.shared
    has_product = "tt.dot" in kernel.asm["ttir"]
    half_product = re.search(r"tt\.dot\b.*xb?f16", kernel.asm["ttir"])
    broken = []
    if usage["STACK"]:
        broken.append(f"{usage['STACK']} bytes spilled")
    if usage["REG"] > MAX_REGISTERS:
        broken.append(f"{usage['REG']} registers")
    if shared > SHARED_LIMIT[capability]:
        broken.append(f"{shared} bytes of shared memory, a block has {SHARED_LIMIT[capability]}")
    if half_product and not (tensor_cores == "wgmma" if capability == 90 else tensor_cores):
        broken.append(f"no {'wgmma' if capability == 90 else 'tensor cores'}")
    if has_product and case.num_stages > 1 and not copies:
        broken.append("no pipeline")
    return Built(
        operation, case.name, target, usage["REG"], usage["STACK"], shared, tensor_cores, copies, tuple(broken)
    )


def build_amd(operation: str, case: CompileCase) -> Built:
    """Compile for AMD's gfx942, with the NVIDIA configuration."""
    try:
        kernel = compiled(case, "hip", AMD)
    except Exception as error:  # the compiler's own errors have no common type
        return Built(operation, case.name, AMD, broken=(f"does not compile: {_reason(error)}",))
    assembly = kernel.asm["amdgcn"]
    registers, local = (
        int(re.search(rf"\.{field}:\s*(\d+)", assembly)[1]) for field in ("vgpr_count", "private_segment_fixed_size")
    )
    matrix = "mfma" if "v_mfma" in assembly else ""
    return Built(operation, case.name, AMD, registers, local, kernel.metadata.shared, matrix)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, ... of the one kernel in a cubin."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK):(\d+)", printed)}


def _first(kinds: dict[str, str], assembly: str) -> str:
    return next((kind for kind, pattern in kinds.items() if re.search(pattern, assembly)), "")


def _reason(error: Exception) -> str:
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return message if len(message) < 500 else f"{message[:300]} … {message[-200:]}"


def _build(operation: str, capability: int, name: str, amd: bool) -> list[Built]:
    (case,) = cases(operation, capability, rf"^{re.escape(name)}$")
    return [build_nvidia(operation, case, capability), *([build_amd(operation, case)] if amd else [])]


def _names(operation: str, capability: int, pattern: str) -> list[str]:
    found = [case.name for case in cases(operation, capability, pattern)]
    if len({*found}) < len(found):
        raise ValueError(f"{operation} names cases of capability {capability} twice: {sorted(found)}")
    return found


def build_all(
    chosen: Iterable[str],
    capabilities: Iterable[int] = tuple(SHARED_LIMIT),
    pattern: str = "",
    short: bool = False,
    amd: bool = False,
    processes: int = 2,
) -> list[Built]:
    """Compile the cases of operations in processes of their own.

    Args:
        chosen: operations.
        capabilities: compute capabilities.
        pattern: regular expression that a case's name must match.
        short: only the cases of `is_default`.
        amd: for gfx942 too, with the configurations of capability 80.
        processes: how many at a time.
    """
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        pairs = [(operation, capability) for operation in chosen for capability in capabilities]
        tasks: list[Future[list[Built]]] = []
        for pair, names in zip(pairs, pool.map(_names, *zip(*pairs, strict=True), [pattern] * len(pairs)), strict=True):
            wanted = [name for name in names if is_default(name)] if short else names
            tasks += [pool.submit(_build, *pair, name, amd and pair[1] == 80) for name in wanted]
        return [built for task in tasks for built in task.result()]


def table(rows: Iterable[Built]) -> str:
    """Markdown."""
    header = ("case", "target", "registers", "spilled", "shared, KiB", "tensor cores", "copies", "budget")
    lines = [header, ["---", "---", *["--:"] * 3, "---", "---", "---"]]
    for row in rows:
        cells = (row.registers, row.local, f"{row.shared / 1024:.1f}", row.tensor_cores, row.copies)
        verdict = "; ".join(row.broken).replace("|", "/") or ("none" if row.target == AMD else "kept")
        lines.append([row.name, row.target, *map(str, cells), verdict])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def document(rows: Sequence[Built], date: str) -> str:
    """The committed table."""
    import torch
    import triton

    broken = sum(bool(row.broken) for row in rows if row.target != AMD)
    amd = [row for row in rows if row.target == AMD]
    reached = f"where {sum(not row.broken for row in amd)} of {len(amd)} cases compile" if amd else "where listed"
    shared = ", ".join(f"{limit // 1024} KiB on sm_{capability}" for capability, limit in SHARED_LIMIT.items())
    parts = [
        f"""# Triton kernels, compiled ahead of time, {date}

`python -m tests.kernels.ahead_of_time{" --amd" if amd else ""} --write docs/kernels_budget.md --date {date}`;
triton {triton.__version__}, torch {torch.__version__.split("+")[0]}. No GPU is used: this says what the compiler made,
not how fast it runs. {len(rows)} compilations, {broken} of them break the budget:

* no spills (bytes of a thread's local memory), at most {MAX_REGISTERS} registers;
* a block's shared memory at most {shared};
* products of half types by tensor-core instructions (wgmma on sm_90);
* asynchronous copies where a kernel with a product is pipelined.

{AMD}, {reached}, is compiled with the configurations of sm_80 and has no budget.
"""
    ]
    for operation in OPERATIONS:
        chosen = [row for row in rows if row.operation == operation]
        if chosen:
            parts.append(f"## {operation}\n\n{table(chosen)}\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels ahead of time and check their budget.")
    parser.add_argument("--operation", choices=OPERATIONS, action="append", help="default: all that have kernels")
    parser.add_argument("--capability", type=int, choices=SHARED_LIMIT, action="append", help="default: all")
    parser.add_argument("--name", default="", help="regular expression for the cases' names")
    parser.add_argument("--short", action="store_true", help="only bf16 and D = 512")
    parser.add_argument("--amd", action="store_true", help=f"for {AMD} too")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--write", type=Path, help="write the document here")
    parser.add_argument("--date", help="for the document")
    args = parser.parse_args()
    if args.write and not args.date:
        parser.error("--write needs --date")
    rows = build_all(
        args.operation or operations(),
        args.capability or tuple(SHARED_LIMIT),
        args.name,
        args.short,
        args.amd,
        args.processes,
    )
    if args.write:
        args.write.write_text(document(rows, args.date))
    print(table(rows))
    sys.exit(any(row.broken for row in rows if row.target != AMD))


if __name__ == "__main__":
    main()
