#!/usr/bin/env bash
# End-to-end in one command:  bash launch/quickstart.sh [KEY=VALUE ...]
#
# Installs into .venv (or the active environment), prepares the real text that ships with the project, trains a
# small MEA model on two processes, exports it to Hugging Face, and uses the export with transformers alone.
# KEY=VALUE overrides configs/quickstart.yaml, for example training.steps=50.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n== %s\n' "$*"; }
began=$SECONDS
work=runs/quickstart

. launch/environment.sh
export PYTHON HF_HUB_OFFLINE=1
installed=$SECONDS

mkdir -p "$work"
# Files of an earlier call are kept: training resumes from its newest checkpoint.
if [ ! -e "$work/tokenizer" ]; then
  say "tokenizer: 2,048 pieces from Shakespeare and the King James Bible"
  "$PYTHON" -m megatron_mea tokenizer --input launch/quickstart/train.jsonl.gz --vocab-size 2048 --out "$work/tokenizer"
fi
for split in train validation; do
  if [ ! -e "$work/data/$split.idx" ]; then
    say "data: $split documents to tokens"
    "$PYTHON" -m megatron_mea prepare --input "launch/quickstart/$split.jsonl.gz" \
      --tokenizer "$work/tokenizer" --out "$work/data/$split"
  fi
done

say "training on 2 processes"
# On the CPU, also where there is a GPU: two processes cannot share one.
CUDA_VISIBLE_DEVICES='' bash launch/local.sh 2 configs/quickstart.yaml "$@"
if [ ! -e "$work/run/FINISHED" ]; then
  say "training was stopped and saved; the same command goes on from there"
  exit 0
fi

say "validation loss in nats a token (lower is better)"
"$PYTHON" tools/unigram.py "$work/data/train" "$work/data/validation"
"$PYTHON" -m megatron_mea evaluate "$work/run" --out "$work/evaluation.json" >/dev/null
"$PYTHON" -c 'import json, sys; print("this MEA model: %.4f" % json.load(open(sys.argv[1]))["cross_entropy"])' \
  "$work/evaluation.json"

say "export to Hugging Face"
rm -rf "$work/export"
"$PYTHON" -m megatron_mea export "$work/run" "$work/export"

say "the export in transformers alone, without this package"
(cd "$work" && "$PYTHON" -P ../../launch/quickstart/use_export.py export "In the beginning")

say "done in $(( SECONDS - installed )) s after $(( installed - began )) s of installation. Everything lies here:"
cat <<TEXT
  $work/tokenizer          the tokenizer
  $work/data               train and validation tokens (.bin/.idx)
  $work/run                metrics.jsonl, heads.jsonl, tensorboard/, checkpoints/
  $work/export             the Hugging Face folder
  next: $PYTHON -m megatron_mea generate $work/export --prompt "To be" --temperature 0.8
        $PYTHON -m tensorboard.main --logdir $work/run/tensorboard
TEXT
