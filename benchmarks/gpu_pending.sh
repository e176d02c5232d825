#!/bin/bash
# What has to be measured on a GPU, in calls of less than four minutes: bash benchmarks/gpu_pending.sh CALL [OUT]
# CALL is one of: list, parity, engine, steps, kernels, sampling, compiled, train. OUT takes the results (default: $OUT or .).
# DRY_RUN=1 prints the commands. `train` needs DATA, a shard set of 256x256 pixels.
set -u
cd "$(dirname "$0")/.." || exit 1
call=${1:-list} out=${2:-${OUT:-.}}
run() { if [ -n "${DRY_RUN:-}" ]; then echo "$*"; else timeout --signal INT 235 "$@"; fi; }
gpu() { run python benchmarks/gpu.py --budget-minutes 3.8 --json "$out/gpu-$call.json" --parts "$@"; }
case $call in
    list) grep -oE '^    [a-z]+\)' "$0" | tr -d ' )' ;;
    parity) run python -m pytest -q -m gpu tests && gpu ceilings unet_parity parity ;;
    engine) gpu ceilings engine ;;
    steps) gpu ceilings training_32 ;;
    kernels) gpu ceilings norms upsampling attention kernels ;;
    sampling) gpu ceilings sampling determinism ;;
    compiled) gpu ceilings compiled_32 ;;
    train) run segdiff train --config best_ct_mr --data "${DATA:-shards}" --run "$out/run" --train.log-every-images 640 ;;
    *) echo "no call $call: $(bash "$0" list | tr '\n' ' ')" >&2; exit 2 ;;
esac
