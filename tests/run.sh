#!/usr/bin/env bash
# The tests:  bash tests/run.sh [--full] [pytest arguments]
# Default: everything that fits 25 minutes on 2 cores. --full runs every matrix.
set -euo pipefail
cd "$(dirname "$0")/.."
MEA_EXTRAS=${MEA_EXTRAS:-test}
. launch/environment.sh
export PYTHON HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
select=(-m "not full")
if [ "${1:-}" = --full ]; then select=(); shift; fi
# Two files at a time: most of a test's time is spent waiting for processes to start.
exec "$PYTHON" -m pytest -n 2 --dist loadfile "${select[@]}" "$@"
