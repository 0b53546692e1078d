#!/usr/bin/env bash
# The tests:  bash tests/run.sh [--fast | --full] [pytest arguments]
# --fast: before every commit; under two minutes on 2 cores, and no test starts a process.
# Default: everything that fits 25 minutes on 2 cores. --full runs every matrix.
set -euo pipefail
cd "$(dirname "$0")/.."
MEA_EXTRAS=${MEA_EXTRAS:-test}
. launch/environment.sh
export PYTHON HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
select=(-m "not full")
case "${1:-}" in
  --fast) select=(--fast); shift ;;
  --full) select=(--full --hypothesis-profile=full); shift ;;
esac
# Two files at a time: most of a test's time is spent waiting for processes to start.
exec "$PYTHON" -m pytest -n 2 --dist loadfile "${select[@]}" "$@"
