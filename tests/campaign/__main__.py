"""`make campaign ARGS="mutations --budget-minutes 10"`: damage inputs, kill stages, and record what becomes of it.

    mutations    damaged inputs: --kinds nifti tar ..., --number of attempts of each kind
    kills        random kills of stages: --kinds train sample ..., --number of kills in all
    disks        full disks: as kills; needs root
    nodes        lost nodes of a Ray cluster: as kills
    places       stages where HOME, TMPDIR or /dev/shm is missing or full, of old RANKs, dead proxies; needs root
    tour         the README's tour, line by line, at the sizes that it states
    table        the tables of docs/reliability.md, from the record

It continues where it was: the same seed gives the same attempts, and those in the record are not made again. A record
is of one version of the code: with another one it is refused.
`replay KIND NUMBER` makes one attempt again and prints what became of it.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from importlib import import_module
from pathlib import Path

from campaign import disks, nodes, places, record, tour
from campaign.attempts import FAULTS, Tally, run_attempts
from campaign.inputs import kinds
from campaign.kills import kill_stages

_PIECE = 50
_TABLES = {
    "mutations": record.table_of_mutations,
    "kills": record.table_of_kills,
    "nodes": nodes.table,
    "disks": disks.table,
    "places": places.table,
    "tour": tour.table,
}


def main(argv: list[str] | None = None) -> int:
    """Exit code 1 if an attempt or a kill of this call was a fault; 2 if the record is of other code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that it leaves no process
    args = _arguments(argv)
    try:
        return _run(args)
    except record.OtherCode as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    if args.what == "table":
        print(f"{record.described_code(args.out)}\n")
        for name, table in _TABLES.items():
            if (args.out / f"{name}.jsonl").is_file():
                print(table(list(record.lines(args.out / f"{name}.jsonl"))))
        return 0
    if args.what == "replay":
        name, number = args.kinds[0], int(args.kinds[1])
        for _, outcome, words in run_attempts(kinds()[name], args.out / "inputs", args.seed, range(number, number + 1)):
            print(f"{outcome}\n{words}")
        return 0
    record.keep_to_code(args.out)
    end = time.monotonic() + 60 * args.budget_minutes
    if args.what == "tour":
        return int(tour.try_tour(args.out, end, 60 * args.line_minutes))
    if args.what == "places":
        return int(places.try_places(args.kinds, args.number, end, args.out))
    if args.what in ("disks", "nodes"):
        disturb = disks.fill_disks if args.what == "disks" else nodes.lose_nodes
        return int(disturb(args.kinds, args.number, args.seed, end, args.out))
    is_bad = False
    if args.what in ("mutations", "all"):
        half = end if args.what == "mutations" else time.monotonic() + 30 * args.budget_minutes
        is_bad |= mutate(args.kinds, args.number, args.seed, half, args.out)
        print(record.table_of_mutations(record.lines(args.out / "mutations.jsonl")))
    if args.what in ("kills", "all"):
        is_bad |= kill_stages(args.kinds, args.number, args.seed, end, args.out)
        print(record.table_of_kills(record.lines(args.out / "kills.jsonl")))
    return int(is_bad)


def mutate(names: list[str], number: int, seed: int, end: float, out: Path) -> bool:
    """Up to `number` attempts of each kind, in pieces, each kind in turn, until `end`. Whether one was a fault."""
    import_libraries()
    chosen = [one for name, one in kinds().items() if not names or name in names]
    file, is_bad = out / "mutations.jsonl", False
    there = record.done(file, seed)
    while time.monotonic() < end:
        waiting = [kind for kind in chosen if there[kind.name] < number]
        if not waiting:
            break
        kind = min(waiting, key=lambda one: there[one.name])
        first = there[kind.name]
        tally, started = Tally(), time.monotonic()
        for at, outcome, words in run_attempts(kind, out / "inputs", seed, range(first, min(number, first + _PIECE))):
            tally.add(at, outcome, words)
            if outcome in FAULTS:
                print(f"{kind.name} {at}: {outcome}: {words.strip().splitlines()[-1][:300]}", flush=True)
        is_bad |= bool(tally.faults)
        there[kind.name] = first + tally.counts.total()
        line = {"kind": kind.name, "seed": seed, "first": first, "tried": tally.counts.total()}
        line |= {"counts": dict(tally.counts), "faults": tally.faults, "seconds": round(time.monotonic() - started, 1)}
        record.append(file, line)
    return is_bad


_LIBRARIES = (
    "pandas", "zarr", "data_shards.store.inspect", "segdiff_dist.denoising.denoiser",
    "segdiff_dist.evaluation.measure.result_files", "segdiff_dist.segmentation.segmenter",
    "segdiff_dist.training.checkpoint",
)  # fmt: skip


def import_libraries() -> None:
    """What the readers import, once, before the processes that read are forked."""
    for name in _LIBRARIES:
        import_module(name)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="all", choices=("all", *_TABLES, "replay", "table"))
    parser.add_argument("kinds", nargs="*", default=[], help="of inputs or stages; all without")
    parser.add_argument("--number", type=int, default=1000, help="attempts of each kind, or kills in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget-minutes", type=float, default=10.0)
    parser.add_argument("--line-minutes", type=float, default=10.0, help="tour: the most that a line may take")
    parser.add_argument("--out", type=Path, default=Path("runs/campaign"), help="the record, and places for the work")
    parser.add_argument("--afresh", action="store_true", help="forget the record")
    args = parser.parse_args(argv)
    if args.afresh:
        shutil.rmtree(args.out, ignore_errors=True)
    return args


if __name__ == "__main__":
    sys.exit(main())
