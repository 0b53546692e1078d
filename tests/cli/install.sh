#!/usr/bin/env bash
# Shells for tests/cli/test_completion.py, on Debian and Ubuntu.
set -euo pipefail
command -v zsh > /dev/null && command -v fish > /dev/null && exit 0
sudo=""
if [ "$(id -u)" != 0 ]; then sudo=sudo; fi
export DEBIAN_FRONTEND=noninteractive
$sudo apt-get update -qq
$sudo apt-get install -qq -y --no-install-recommends zsh fish > /dev/null
