"""Compile every kernel without a GPU, and report registers, spills and widths of loads.

    python -m segdiff_kernels.compiling [--arch 80 90] [--json] [MODULE ...]

A module lists its cases in `compile_cases()`; without names, all `segdiff_kernels._*_triton` are compiled. A kernel
fails if it does not compile, if registers spill, or if it streams and has more loads narrower than 16 bytes a thread
than its case allows. Triton's package contains ptxas and cuobjdump, so no CUDA toolkit is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from segdiff_kernels.backend import is_interpreted
from segdiff_kernels.compile_cases import CompileCase

ARCHITECTURES = (80, 90)
_WIDEST_BYTES = 16
# The suffix of a memory instruction that says how many bytes a thread moves; without one it is four.
_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Compiled:
    """The compiled code of one case on one architecture."""

    name: str
    arch: int
    registers: int = 0
    """Registers of a thread."""
    spilled_bytes: int = 0
    """Bytes of a thread written to and read from local memory because registers did not suffice, as ptxas counts
    them."""
    shared_bytes: int = 0
    loads: dict[int, int] | None = None
    """Bytes a thread -> number of instructions that load this many from global memory. None if it does not stream."""
    stores: dict[int, int] | None = None
    """The same for stores."""
    problems: tuple[str, ...] = ()
    """Why the case fails; empty if it passes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 if a case fails, 2 if there is nothing to compile."""
    parser = argparse.ArgumentParser(prog="python -m segdiff_kernels.compiling", description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="import names; default: all of segdiff_kernels")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), help="80 for sm_80; default 80 90")
    parser.add_argument("--workers", type=int, default=2, help="processes; default 2")
    parser.add_argument("--json", action="store_true", help="print a list of objects, not a table")
    given = list(sys.argv[1:] if arguments is None else arguments)
    parsed = parser.parse_args(given)
    if is_interpreted():  # decided when Triton is imported, so only a new process can compile
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "segdiff_kernels.compiling", *given]
        return subprocess.run(command, env=environment, check=False).returncode
    try:
        rows = compile_all(parsed.modules or kernel_modules(), parsed.arch, parsed.workers)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=1) + "\n" if parsed.json else _table(rows))
    return int(any(row.problems for row in rows))


def kernel_modules() -> list[str]:
    """Import names of the package's modules with kernels."""
    return [f"segdiff_kernels.{path.stem}" for path in sorted(Path(__file__).parent.glob("_*_triton.py"))]


def compile_all(modules: Sequence[str], architectures: Sequence[int], num_workers: int) -> list[Compiled]:
    """Every case of the modules on every architecture, in that order.

    Raises ValueError under Triton's interpreter, and if a module has no compile_cases().
    """
    if is_interpreted():
        raise ValueError("TRITON_INTERPRET: 1; the interpreter compiles nothing, so unset it before Triton is imported")
    cases = []
    for module in modules:
        make_cases = getattr(importlib.import_module(module), "compile_cases", None)
        if make_cases is None:
            raise ValueError(f"{module}: has no compile_cases(); list the shapes and dtypes that it is launched with")
        cases += make_cases()
    # Forked, so that torch and Triton are imported once and cases need not be pickled.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_remember, initargs=(cases,)) as pool:
        jobs = [(index, arch) for arch in architectures for index in range(len(cases))]
        return list(pool.map(_compile_job, *zip(*jobs, strict=True))) if jobs else []


def compile_case(case: CompileCase, arch: int) -> Compiled:
    """One case for sm_`arch`. A failed compilation is a problem of the case, not an exception."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.function.arg_names
    signature = {name: "constexpr" if name in case.constants else case.signature[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible_by_16}
    source = ASTSource(case.function, signature, case.constants, attributes)
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope(), triton.knobs.nvidia.scope():
        triton.knobs.cache.dir, triton.knobs.nvidia.dump_ptxas_log = folder, True
        try:
            with contextlib.redirect_stdout(said):
                options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
                kernel = triton.compile(source, GPUTarget("cuda", arch, 32), options)
        except Exception as error:  # any error of the compiler is a problem of the case
            return Compiled(case.name, arch, problems=(f"does not compile: {_last_line(error)}",))
        sass = ""
        if case.streams:  # widths matter only there, and disassembling takes as long as compiling
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(kernel.asm["cubin"])
            command = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
            sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return properties_of(case, arch, said.getvalue(), sass, kernel.metadata.shared)


def properties_of(case: CompileCase, arch: int, ptxas_log: str, sass: str, shared_bytes: int) -> Compiled:
    """The figures from `ptxas -v` and the machine code ("" unless the case streams)."""
    registers = re.search(r"Used (\d+) registers", ptxas_log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", ptxas_log)
    if registers is None or not spills:
        raise RuntimeError(f"{case.name}: ptxas -v says neither registers nor spills:\n{ptxas_log}")
    loads, stores = (_widths(sass, kind) if sass else None for kind in ("LDG|LDGSTS", "STG"))
    spilled_bytes = sum(map(int, spills))
    num_narrow = sum(count for width, count in (loads or {}).items() if width < _WIDEST_BYTES)
    problems = []
    if spilled_bytes:
        problems.append(f"{spilled_bytes} bytes of registers spilled")
    if case.streams and num_narrow > case.narrow_loads:
        problems.append(f"{num_narrow} loads narrower than {_WIDEST_BYTES} bytes, {case.narrow_loads} allowed")
    return Compiled(
        case.name, arch, int(registers[1]), spilled_bytes, shared_bytes, loads, stores, problems=tuple(problems)
    )


_cases: list[CompileCase] = []


def _remember(cases: list[CompileCase]) -> None:
    _cases[:] = cases


def _compile_job(index: int, arch: int) -> Compiled:
    return compile_case(_cases[index], arch)


def _widths(sass: str, operations: str) -> dict[int, int]:
    """Bytes a thread -> instructions of these operations, widest first."""
    found: Counter[int] = Counter()
    for suffixes in re.findall(rf"\b(?:{operations})((?:\.\w+)*) ", sass):
        found[next((_BYTES[part] for part in suffixes.split(".") if part in _BYTES), 4)] += 1
    return dict(sorted(found.items(), reverse=True))


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"


def _table(rows: Sequence[Compiled]) -> str:
    head = ("kernel", "arch", "registers", "spilled B", "shared B", "loads (bytes x count)", "stores", "")
    cells: list[tuple[str, ...]] = [head]
    for row in rows:
        loads, stores = (" ".join(f"{w}x{n}" for w, n in (kind or {}).items()) for kind in (row.loads, row.stores))
        status = "; ".join(row.problems) or "ok"
        numbers = map(str, (row.registers, row.spilled_bytes, row.shared_bytes))
        cells.append((row.name, f"sm_{row.arch}", *numbers, loads, stores, status))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "".join("  ".join(map(str.ljust, line, widths)).rstrip() + "\n" for line in cells)


if __name__ == "__main__":
    sys.exit(main())
