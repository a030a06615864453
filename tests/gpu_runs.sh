#!/usr/bin/env bash
# What executed/reference/h200 holds, on one machine with four GPUs: tests/gpu_runs.sh SECONDS [PYTHON]
# Accuracy first on the last card, hardware on the others; then hardware on all. What fails is left out, what is finished
# is kept: after SECONDS, or on another machine, the same call goes on.
set -u
end=$(( $(date +%s) + $1 )); python=${2:-python3}
last=$(( $(nvidia-smi -L | wc -l) - 1 )); others=$(seq -s, 0 $(( last > 0 ? last - 1 : 0 )))

run() { # cards, then make's arguments; until the time is over
  local cards=$1; shift
  CUDA_VISIBLE_DEVICES=$cards timeout -k 5 $(( end - $(date +%s) )) make -k PYTHON="$python" "$@"
}

accuracy() {
  run "$last" -j3 accuracy STUDY=smollm2-135m
  [ -e .cache/data ] && run "$last" -j3 accuracy STUDY=smollm2-135m-public
}

llama="STUDY=llama-3.2-1b-random"
small="STUDY=smollm2-135m"
{ accuracy; run "$last" -j1 hardware $small CONFIGS="fp16 nf4 fp4" ; } &
run "$others" -j3 hardware $llama CONFIGS="fp16 nf4 fp4 gptq fp8 int8"
run "0,$others" -j4 hardware $small CONFIGS="fp16 nf4 fp4 int8" PROCESSES=3
run "0,$others" -j4 hardware $small PROCESSES=1
wait
run "0,$others,$last" -j4 hardware $llama PROCESSES=1
