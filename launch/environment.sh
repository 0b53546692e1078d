# Sourced by the scripts: sets PYTHON to the active environment, or to .venv (made here), with the package in it.
# MEA_EXTRAS names extras to install, for example MEA_EXTRAS=test,megatron.

if [ -n "${VIRTUAL_ENV:-}" ]; then
  PYTHON=$VIRTUAL_ENV/bin/python
elif [ -n "${CONDA_PREFIX:-}" ]; then
  PYTHON=$CONDA_PREFIX/bin/python
else
  if [ ! -x .venv/bin/python ]; then
    echo "making .venv"
    python3 -m venv .venv
  fi
  PYTHON=$PWD/.venv/bin/python
fi

# Where torch is there already (a cluster's own build) it stays; elsewhere this version was tested.
if ! "$PYTHON" -c 'import torch' 2>/dev/null; then
  echo "installing torch"
  "$PYTHON" -m pip install --quiet "${MEA_TORCH:-torch==2.13.0}"
fi
if ! "$PYTHON" launch/installed.py $(echo "${MEA_EXTRAS:-}" | tr , " "); then
  echo "installing megatron_mea${MEA_EXTRAS:+[$MEA_EXTRAS]} and what it needs"
  "$PYTHON" -m pip install --quiet --editable ".${MEA_EXTRAS:+[$MEA_EXTRAS]}"
fi
