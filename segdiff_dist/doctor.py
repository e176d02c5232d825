"""`segdiff doctor`: what this machine can run; for each engine, what was found, what is used instead, how to get it.

It checks what is installed, then tries Ray, DALI, DeepSpeed, MLflow and, on a GPU, Triton for real (trials.py), because
an installed one may not work. Nothing here runs during training.
"""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from data_shards import __version__
from data_shards.fan_out import num_cores
from data_shards.host_memory import host_memory
from segdiff_dist.trials import MOST_S, TRIALS, Trial, attempt

State = Literal["ok", "instead", "missing"]

_DISTRIBUTION = "segdiff-dist"
_GIB = 1024**3
# The memory that `segdiff demo` may take, by its own test.
_DEMO_GIB = 6.0
# Engines with a row of their own; every other requirement of the distribution is one of "other libraries".
_SHOWN = (
    ("diffusers", "diffusers", "the denoiser and its schedulers"),
    ("Ray", "ray", "prepare, sample and evaluate fan out on it"),
    ("MLflow", "mlflow", "tracking"),
    ("WebDataset", "webdataset", "shards are written with it"),
    ("Zarr", "zarr", "generated images are stored with it"),
    ("MONAI", "monai", "resampling, the auxiliary segmenter, surface Dice"),
    ("torchmetrics", "torchmetrics", "image metrics"),
)
_PROBED = ("torch", "deepspeed", "nvidia-dali-cuda130", "triton")


@dataclass(frozen=True)
class Row:
    """One line of the report. `ok`: as intended; `instead`: a fallback is used; `missing`: it must be installed or
    repaired."""

    name: str
    state: State
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Gpus:
    """The NVIDIA GPUs that torch can use."""

    names: tuple[str, ...] = ()
    memory_gib: tuple[float, ...] = ()


def diagnose(tries: bool = True) -> tuple[str, list[str]]:
    """The report, and the names of the engines that the pipeline needs but that are missing or do not work. `tries`:
    start them."""
    gpus, torch_rows = _torch()
    sections = [
        ("machine", [*_machine(), *_gpu(gpus)]),
        (
            "engines",
            [
                *(*torch_rows, _deepspeed(), _dali(gpus), *_libraries()),
                *(_attention(gpus), _triton(gpus), _annotator(), _fid(), _lpips(), _frd()),
            ],
        ),
    ]
    missing = [row.name for _, rows in sections for row in rows if row.state == "missing"]
    if tries:
        skipped = {*missing, *(() if gpus.names else ("Triton",))}
        tried = [_tried(trial) for trial in TRIALS if trial.name not in skipped]
        sections.append(("tried", tried))
        missing += [row.name for row in tried if row.state == "missing"]
    end = f"{len(missing)} missing: {', '.join(missing)}" if missing else "This machine can run the whole pipeline."
    return f"segdiff {__version__}\n\n{format_report(sections)}\n\n{end}", missing


def _tried(trial: Trial) -> Row:
    """The row of an engine that was started."""
    outcome = attempt(trial.name, MOST_S)
    if outcome.failure:
        return Row(trial.name, "missing", f"{trial.does}: {outcome.failure}", f"try {trial.remedy}")
    return Row(trial.name, "ok", f"{trial.does}, in {outcome.seconds:.0f} s")


def format_report(sections: Iterable[tuple[str, list[Row]]]) -> str:
    """The rows as aligned columns; each remedy is on a separate line below its row."""
    sections = list(sections)
    width = max(len(row.name) for _, rows in sections for row in rows)
    lines: list[str] = []
    for title, rows in sections:
        lines += ["", title] if lines else [title]
        for row in rows:
            lines.append(f"  {row.name:<{width}}  {row.state:<7}  {row.found}")
            if row.remedy:
                lines.append(f"  {'':<{width}}  {'':<7}  -> {row.remedy}")
    return "\n".join(lines)


def _machine() -> list[Row]:
    system, machine = platform.system(), platform.machine()
    cores = num_cores()
    rows = [
        Row("platform", "ok", f"{system} {machine}")
        if (system, machine) == ("Linux", "x86_64")
        else Row(
            "platform",
            "missing",
            f"{system} {machine}: DALI, Triton and xformers are used on Linux x86-64 alone, so train and "
            "train-segmenter cannot run",
            "use a Linux x86-64 machine, a container or WSL 2",
        ),
        Row("Python", "ok", f"{platform.python_version()} in {sys.prefix}")
        if (3, 11) <= sys.version_info < (3, 13)
        else Row("Python", "missing", platform.python_version(), "use Python 3.11 or 3.12"),
        Row("cores", "ok", str(cores)),
    ]
    memory = _memory_gib()
    if memory is not None:
        enough = memory >= _DEMO_GIB
        rows.append(
            Row(
                "memory",
                "ok" if enough else "instead",
                f"{memory:.1f} GiB",
                "" if enough else f"the demo needs up to {_DEMO_GIB:.0f} GiB; use a smaller config",
            )
        )
    rows.append(Row("disk", "ok", f"{shutil.disk_usage('.').free / _GIB:.0f} GiB free here"))
    return rows


def _memory_gib() -> float | None:
    """Memory this process may use: the machine's, or its container's if that is less."""
    memory = host_memory()
    return memory and memory.total / _GIB


def _gpu(gpus: Gpus) -> list[Row]:
    if not gpus.names:
        return [Row("GPU", "instead", "none that torch can use: everything runs on the CPU")]
    return [
        Row(f"GPU {i}", "ok", f"{name}, {memory:.0f} GiB")
        for i, (name, memory) in enumerate(zip(gpus.names, gpus.memory_gib, strict=True))
    ]


def _torch() -> tuple[Gpus, list[Row]]:
    row, works = requirement_row("torch", "torch", "")
    if not works:
        return Gpus(), [row]
    try:
        import torch

        from segdiff_dist.ranks.precision import fast_precision
    except (ImportError, OSError) as error:
        return Gpus(), [
            Row("torch", "missing", f"{row.found}, but it does not import: {_short(error)}", _reinstall("torch"))
        ]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    properties = [torch.cuda.get_device_properties(i) for i in range(count)]
    gpus = Gpus(tuple(p.name for p in properties), tuple(p.total_memory / _GIB for p in properties))
    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    blind = shutil.which("nvidia-smi") is not None and not count
    fast = {fast_precision(torch.device("cuda", i)) for i in range(count)} or {fast_precision(torch.device("cpu"))}
    slow = "no arithmetic for bf16, which would be slow here: precision auto is fp32"
    return gpus, [
        Row("bf16", "ok", "precision auto is bf16") if fast == {"bf16"} else Row("bf16", "instead", slow),
        Row(
            "torch",
            "instead" if blind else "ok",
            f"{torch.__version__}, {build}" + (", which sees none of this machine's GPUs" if blind else ""),
            "install torch's CUDA build and a driver that is new enough for it" if blind else "",
        ),
    ]


def _deepspeed() -> Row:
    return requirement_row("DeepSpeed", "deepspeed", "sharded mixed-precision training")[0]


def _dali(gpus: Gpus) -> Row:
    row, works = requirement_row("DALI", "nvidia-dali-cuda130", "")
    return Row("DALI", "ok", f"{row.found}, {'GPU' if gpus.names else 'CPU'} backend") if works else row


def _libraries() -> list[Row]:
    rows = [requirement_row(name, distribution, use)[0] for name, distribution, use in _SHOWN]
    shown = {distribution for _, distribution, _ in _SHOWN} | set(_PROBED)
    try:
        requirements = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return [*rows, Row(_DISTRIBUTION, "missing", "not installed", "pip install -c constraints.txt -e .")]
    from packaging.requirements import Requirement

    others = [
        r.name
        for r in map(Requirement, requirements)
        if r.name not in shown and (r.marker is None or r.marker.evaluate({"extra": ""}))
    ]
    wrong = [row for name in others for row, works in [requirement_row(name, name, "")] if not works]
    return rows + (wrong or [Row("other libraries", "ok", f"all {len(others)}")])


def _attention(gpus: Gpus) -> Row:
    version = installed_version("xformers")
    if not gpus.names:
        return Row("xformers", "instead", "needs an NVIDIA GPU: attention runs on torch's scaled_dot_product_attention")
    if version is None:
        return Row(
            "xformers",
            "instead",
            "not installed: attention runs on torch's scaled_dot_product_attention",
            _extra("cuda"),
        )
    import torch

    from segdiff_dist.attention import why_not_xformers

    reason = why_not_xformers(torch.device("cuda"))
    if reason is not None:
        text = f"{version} {reason}; attention runs on torch's scaled_dot_product_attention"
        return Row("xformers", "instead", text)
    return Row("xformers", "ok", version)


def _triton(gpus: Gpus) -> Row:
    """Triton is needed on a GPU only; the extra `cuda` installs it."""
    if gpus.names:
        return requirement_row("Triton", "triton", "fused kernels")[0]
    found = installed_version("triton") or "not installed"
    return Row("Triton", "instead", f"{found}: without a GPU the kernels' torch references are used")


def _annotator() -> Row:
    """The tool that `segdiff annotate` runs unless another is named."""
    tool = shutil.which("TotalSegmentator")
    if tool is not None:
        return Row("TotalSegmentator", "ok", tool)
    found = "not on PATH: whole-body masks come from a folder, or from another tool by --annotate.command"
    return Row("TotalSegmentator", "instead", found, "pip install TotalSegmentator, in an environment of its own")


def _fid() -> Row:
    from segdiff_dist.evaluation.metrics.inception import WEIGHTS_FILE, downloaded_weights

    absent = [name for name in ("torch-fidelity", "torchvision") if installed_version(name) is None]
    if absent:
        return Row(
            "FID",
            "instead",
            f"{' and '.join(absent)} not installed: segmenter_frechet is reported, and FID is not",
            _extra("fid"),
        )
    weights = downloaded_weights() if installed_version("torch") else None
    if weights is None or not weights.is_file():
        return Row(
            "FID",
            "instead",
            "its Inception weights are not here: segmenter_frechet is reported, and FID is not",
            f"set evaluate.fid_weights to 'download', or to the path of {WEIGHTS_FILE}",
        )
    return Row("FID", "ok", f"torch-fidelity {installed_version('torch-fidelity')}, weights in {weights}")


def _lpips() -> Row:
    from segdiff_dist.evaluation.metrics.perceptual import DOWNLOAD, missing_for_lpips

    if missing_for_lpips(DOWNLOAD) is None:
        return Row("LPIPS", "ok", f"lpips {installed_version('lpips')}; evaluate.lpips_weights names its AlexNet")
    return Row("LPIPS", "instead", "not installed: SSIM and MS-SSIM are reported, and LPIPS is not", _extra("lpips"))


def _frd() -> Row:
    from segdiff_dist.evaluation.metrics.radiomics import missing_for_frd

    if missing_for_frd(1) is None:
        return Row("FRD", "ok", f"frd-score {installed_version('frd-score')}")
    remedy = f"Python 3.11: pip install --no-build-isolation pyradiomics==3.0.1, {_extra('frd')}; see docs/metrics.md"
    return Row("FRD", "instead", "not installed: segmenter_frechet is reported, and FRD is not", remedy)


def _extra(name: str) -> str:
    return f"pip install -c constraints.txt -e '.[{name}]'"


def _reinstall(distribution: str) -> str:
    return f"pip install --force-reinstall --no-deps -c constraints.txt {distribution}"


def requirement_row(name: str, distribution: str, use: str) -> tuple[Row, bool]:
    """The row of a library that the pipeline needs, and whether it is installed in a version that fits."""
    version = installed_version(distribution)
    what = f": {use}" if use else ""
    if version is None:
        return Row(name, "missing", f"not installed{what}", f"pip install -c constraints.txt {distribution}"), False
    wanted = _wanted(distribution)
    if wanted is not None and not wanted[1]:
        remedy = f"pip install -c constraints.txt '{distribution}{wanted[0]}'"
        return Row(name, "missing", f"{version} does not fit {wanted[0]}{what}", remedy), False
    return Row(name, "ok", version), True


def _wanted(distribution: str) -> tuple[str, bool] | None:
    """The version range that this distribution requires, and whether the installed version is in it; None if it
    requires none."""
    try:
        from packaging.requirements import Requirement

        for requirement in map(Requirement, metadata.requires(_DISTRIBUTION) or []):
            if requirement.name == distribution and requirement.specifier:
                fits = requirement.specifier.contains(metadata.version(distribution), prereleases=True)
                return str(requirement.specifier), fits
    except (ImportError, metadata.PackageNotFoundError):
        pass
    return None


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
