#!/usr/bin/env bash
# What executed/reference holds of GPU runs, on one machine with two GPUs or more: tests/gpu_runs.sh SECONDS [PYTHON]
# The last card does what may share a card (accuracy), the others time the hardware; then all of them time what is left.
# What fails is left out, what is finished is kept: after SECONDS, or on another machine, the same call goes on.
set -u
end=$(( $(date +%s) + $1 )); python=${2:-python3}
last=$(( $(nvidia-smi -L | wc -l) - 1 )); others=$(seq -s, 0 $(( last > 0 ? last - 1 : 0 )))
export ACCEPT_GEMMA_TERMS=1 # whoever calls this has read them
mkdir -p executed/logs

# A benchmark of a step of launches measures the host too: each lane keeps to cores of its own.
mapfile -t cores < <("$python" -c 'import os; print(*sorted(os.sched_getaffinity(0)), sep="\n")')
share=$(( ${#cores[@]} * 5 / 8 ))
lane() { local IFS=,; taskset -pc "$*" $BASHPID > /dev/null; } # for what is started from here on

run() { # name of the log, cards, then a command; until the time is over
  local log=executed/logs/$1.log cards=$2 left=$(( end - $(date +%s) )) code=0; shift 2
  [ $left -gt 0 ] || return
  echo "$(date +%T) start $*" >> "$log"
  CUDA_VISIBLE_DEVICES=$cards timeout -k 5 $left "$@" >> "$log" 2>&1 || code=$?
  echo "$(date +%T) end $code $*" >> "$log"
}
study() { run "$1-$3" "$2" make -k PYTHON="$python" "${@:4}" "$3" STUDY="$1"; }
await() { until [ -e "$1" ] || [ "$(date +%s)" -gt "$end" ]; do sleep 1; done; } # a file that another makes

timed="fp16 nf4 fp4 gptq fp8 int8" later="gptq fp8 int8"
smollm2=.cache/SmolLM2-135M-Instruct.Q4_1.gguf
gemma=.cache/gemma-3-270m-q4_k_m.gguf

timings() { # of a study: half of its formats are complete before the others begin
  for part in "fp16 nf4 fp4" "$later"; do study "$1" "$others" hardware -j$last CONFIGS="$part" PROCESSES=3; done
}

hardware() { # the 1B shape needs no model file
  lane "${cores[@]:0:share}"
  study llama-3.2-1b-random "$others" hardware -j$last CONFIGS="$timed" PROCESSES=3
  await $smollm2
  timings smollm2-135m
  await $gemma
  timings gemma3-270m
}

shared() { # what may share a card, at once: the locks of helpers/cards.py keep their number down
  local jobs=() # `wait` alone would wait for the hardware too
  lane "${cores[@]:share}"
  export OMP_NUM_THREADS=4
  await $smollm2
  run setup "$last" make PYTHON="$python" executed/smollm2-135m/setup.json STUDY=smollm2-135m
  study smollm2-135m "$last" accuracy -j3 & jobs+=($!)
  { await $gemma; study gemma3-270m "$last" accuracy -j3; } & jobs+=($!)
  { [ -e .cache/data ] && study smollm2-135m-public "$last" accuracy -j3; } & jobs+=($!)
  run recipe "$last" "$python" tests/bench_recipe.py --seeds 0 1 2 --jobs 2 --out executed/recipe.json & jobs+=($!)
  wait "${jobs[@]}"
  OMP_NUM_THREADS=16 run bench_eval "$last" "$python" tests/bench_eval.py --limit 50 --configurations fp16 \
    --stock-batch-sizes 256 512
  study smollm2-135m-calibration "$last" accuracy -j4 & jobs=($!)
  run rehearsal "$last" "$python" tests/bench_rehearsal.py --targets accuracy --jobs 3 --configs fp16 nf4 \
    --out executed/rehearsal.json & jobs+=($!)
  wait "${jobs[@]}"
  run gpu_tests "$last" "$python" -m pytest -q -p no:cacheprovider tests/test_architectures.py \
    tests/test_dialogue.py -k "gpu or captured"
  study gemma3-270m "$last" hardware CONFIGS="$later" PROCESSES=3 # what the other cards have begun is refused here
}

hardware & shared &
wait
run bench_peer "$last" make PYTHON="$python" bench-peer
run check_gpu "$last" "$python" tests/check_gpu.py --json executed/check_gpu.json
