#!/usr/bin/env bash
# A browser without a screen for tests/experiments/test_report.py, on Debian and Ubuntu.
set -euo pipefail
command -v chromium-headless-shell > /dev/null || command -v chromium > /dev/null && exit 0
sudo=""
if [ "$(id -u)" != 0 ]; then sudo=sudo; fi
export DEBIAN_FRONTEND=noninteractive
$sudo apt-get update -qq
$sudo apt-get install -qq -y --no-install-recommends chromium-headless-shell fonts-dejavu-core > /dev/null ||
  $sudo apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core > /dev/null
