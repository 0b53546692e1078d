#!/usr/bin/env bash
# Installs SLURM and munge (Debian and Ubuntu) for the tests of this folder; without them these tests are skipped.
set -euo pipefail

missing() { ! type slurmctld slurmd munged sbatch srun scontrol >/dev/null 2>&1; }
skip() { echo "tests/slurm/install.sh: $1: the tests on SLURM will be skipped" >&2; exit 0; }

missing || exit 0
[ "$(id -u)" = 0 ] || skip "not root"
command -v apt-get >/dev/null || skip "no apt-get"

log=$(mktemp)
policy=
trap 'rm -f "$log" $policy' EXIT
# The packages' daemons must not start: the tests start their own.
if [ ! -e /usr/sbin/policy-rc.d ]; then
  policy=/usr/sbin/policy-rc.d
  printf '#!/bin/sh\nexit 101\n' >$policy
  chmod 755 $policy
fi

export DEBIAN_FRONTEND=noninteractive
apt() { apt-get -y -o DPkg::Lock::Timeout=180 -o Dpkg::Use-Pty=0 "$@" >>"$log" 2>&1; }
echo "installing slurm-wlm and munge"
apt install --no-install-recommends slurm-wlm munge ||
  { apt update && apt install --no-install-recommends slurm-wlm munge; } ||
  { tail -n 5 "$log" >&2; skip "apt-get failed"; }
! missing || skip "slurm-wlm lacks a daemon"
