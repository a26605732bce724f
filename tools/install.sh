#!/bin/sh
# Make a virtual environment and install muybridge into it, editable, at the versions of constraints.txt.
#   sh tools/install.sh .venv
# Without an NVIDIA driver torch comes as its CPU build: the default build for Linux brings several GB of CUDA libraries.
set -eu
venv=${1:-.venv}
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."

"$python" - <<'PY' || { echo "muybridge needs Python 3.10 or newer; give one with: make PYTHON=python3.12 ..." >&2; exit 1; }
import sys
sys.exit(0 if sys.version_info >= (3, 10) else 1)
PY

if [ ! -x "$venv/bin/python" ]; then
    echo "making $venv"
    "$python" -m venv "$venv" || { echo "no venv module here (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
fi
pip="$venv/bin/python -m pip --disable-pip-version-check"

torch=$(sed -n 's/^torch==//p' constraints.txt)
if "$venv/bin/python" -c "import torch" 2>/dev/null; then
    :
elif [ "$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then
    echo "installing torch $torch for the CPU (no NVIDIA driver here)"
    # A wheel that pip already knows of first; the PyTorch index is the public place for CPU builds.
    $pip install --quiet "torch==$torch+cpu" 2>/dev/null ||
        $pip install --quiet "torch==$torch+cpu" --index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple
else
    echo "installing torch $torch"
    $pip install --quiet "torch==$torch"
fi
echo "installing muybridge"
$pip install --quiet --constraint constraints.txt --editable '.[dev]'
