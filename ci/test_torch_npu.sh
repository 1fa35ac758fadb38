#!/usr/bin/env bash
# Runs the zoo on the real torch_npu, with libraries that stand in for CANN; a nightly job, of about
# 10 minutes on two idle cores:
#   bash ci/test_torch_npu.sh [MODEL ...] [what pytest takes: -k WORD, -x, ...]
# It makes an environment of its own, .venv-torch-npu, with the torch and torch_npu of
# tools/pins/npu.txt. When all models were run, the result is written to
# common/npu_sim/records/torch_npu_<version>.json, to be committed.
set -euo pipefail
cd "$(dirname -- "${BASH_SOURCE[0]}")/.."
source tools/environment.sh
python=$(zoo_find_python)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$python" ci/test_torch_npu.py "$@"
