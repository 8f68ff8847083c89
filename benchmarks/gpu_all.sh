#!/usr/bin/env bash
# Install this checkout into the present Python, without a network, and run the GPU report. PYTHON=... for another one.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
"$PYTHON" -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .
exec "$PYTHON" -u -m benchmarks.gpu_report "$@"
