"""`python -m segdiff_dist COMMAND`, for launchers that start a module: `deepspeed --module segdiff_dist train ...`."""

from segdiff_dist.program import run

if __name__ == "__main__":
    raise SystemExit(run())
