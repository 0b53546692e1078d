#!/usr/bin/env bash
# Which learning rates each variant stands, and how low its loss gets at its best (docs/results/learning-rate.md):
#   bash tools/learning_rate_study.sh [RUNS_AT_ONCE]          default: a run a core, one thread each
# About 4 core-hours. Results are in runs/study: the same command resumes where it stopped, and in the end writes the
# reports again.
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

all=plain,mea,plain_norm,mea_no_norm,differential,talking_heads
# As the paper chooses a rate: fixed ones.
sweep --variants "$all" --learning-rates 1e-3,3e-3,1e-2,3e-2,1e-1 --seeds 1 --out "$work/selection"
# As it trains: the rate that was the best of all variants, and a cosine.
final() { sweep schedule.kind=cosine training.steps=600 --out "$work/final" "$@"; }
final --variants "$all" --learning-rates 3e-3 --seeds 1,2,3
final --variants plain,mea --learning-rates 1e-2 --seeds 1
for part in selection final; do mea report "$work/$part" --out "docs/results/$part.html" --tokens 1e7; done
