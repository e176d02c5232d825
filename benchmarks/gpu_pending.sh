#!/bin/bash
# What has to be measured on a GPU, in calls of less than four minutes: bash benchmarks/gpu_pending.sh CALL [OUT]
# CALL is one of: list, parity, engine, steps, kernels, sampling, compiled, train. OUT takes the results (default: $OUT or .).
# `parity` comes first. It begins with the kernels whose programs wait for each other, in a process of its own, for at
# most a minute. If one hangs or is wrong, all that follows takes three launches in its place, in later calls too: they
# see OUT/three-launches. Where OUT is not kept between calls, set THREE_LAUNCHES=1 for them.
# DRY_RUN=1 prints the commands; TOY=1 runs them at toy size on a CPU. `train` needs DATA, a shard set of 256x256 pixels.
set -u
cd "$(dirname "$0")/.." || exit 1
call=${1:-list} out=${2:-${OUT:-.}}
[ -n "${DRY_RUN:-}" ] || mkdir -p "$out" || exit 1
batch=${TOY:+2} batch=${batch:-32}
module=(python -m)
use_three_launches() {
    three=1
    # Parts of no bytes: tiles.one_pass_channels finds none that fit.
    module=(python -c 'import runpy, sys
from segdiff_kernels import tiles
tiles.PART_BYTES = 0
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)')
}
three=
if [ -n "${THREE_LAUNCHES:-}" ] || [ -e "$out/three-launches" ]; then use_three_launches; fi
left() { echo $((SECONDS < 220 ? 225 - SECONDS : 5)); }
# SECONDS GRACE COMMAND...: INT after that time. Python does not see it while it waits for the GPU, so KILL follows.
run() {
    local limit=$1 grace=$2
    shift 2
    if [ -n "${DRY_RUN:-}" ]; then echo "$*"; else timeout --signal INT --kill-after "$grace" "$limit" "$@"; fi
}
gpu() {
    run "$(left)" 10 python benchmarks/gpu.py ${TOY:+--dry-run} ${three:+--three-launches} \
        --budget-minutes "$(awk "BEGIN { print $(left) / 60 }")" --json "$out/gpu-$call.json" --parts "$@"
}
parity() {
    local failed=0
    run 60 10 python benchmarks/gpu.py ${TOY:+--dry-run} --json "$out/gpu-one-pass.json" --parts one_pass || {
        echo "the norms in one kernel failed (exit code $?; 124 and 137: it hung): three launches instead;" \
            "where $out is not kept, set THREE_LAUNCHES=1 in later calls" >&2
        use_three_launches
        touch "$out/three-launches"
        failed=1
    }
    gpu ceilings unet_parity parity || failed=1
    run "$(left)" 10 "${module[@]}" pytest -q -m gpu tests || failed=1
    return $failed
}
case $call in
    list) grep -oE '^    [a-z]+\)' "$0" | tr -d ' )' ;;
    parity) parity ;;
    engine) gpu ceilings engine ;;
    steps) gpu ceilings "training_$batch" ;;
    kernels) gpu ceilings norms upsampling attention kernels ;;
    sampling) gpu ceilings sampling determinism ;;
    compiled) gpu ceilings "compiled_$batch" ;;
    # After INT it saves and exports.
    train) run 190 45 "${module[@]}" segdiff_dist train --config best_ct_mr --data "${DATA:-shards}" --run "$out/run" \
        --train.log-every-images 640 ${TOY:+--dry-run} ;;
    *) echo "no call $call: $(bash "$0" list | tr '\n' ' ')" >&2; exit 2 ;;
esac
