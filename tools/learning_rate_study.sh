#!/usr/bin/env bash
# Which learning rates each variant stands, and how low its loss gets at its best (docs/results/learning-rate.md):
#   bash tools/learning_rate_study.sh [RUNS_AT_ONCE]          default: a run a core, one thread each
# About 4 core-hours. What is done is kept in runs/study: the same command goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
at_once=${1:-$(getconf _NPROCESSORS_ONLN)}
work=runs/study config=configs/studies/learning-rate.yaml
mea() { "${PYTHON:-python3}" -m megatron_mea "$@"; }
sweep() { mea sweep "$config" --at-once "$at_once" "$@"; }

[ -e "$work/tokenizer" ] || mea tokenizer --input launch/quickstart/train.jsonl.gz --vocab-size 2048 --out "$work/tokenizer"
for split in train validation; do
  [ -e "$work/data/$split.idx" ] || mea prepare --input "launch/quickstart/$split.jsonl.gz" --tokenizer "$work/tokenizer" --out "$work/data/$split"
done
