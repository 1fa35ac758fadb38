#!/usr/bin/env bash
# Options and defaults: bash test/train_performance_multinodes.sh --help
set -euo pipefail
export ZOO_CALLER_DIR=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python3 -c 'import zoo_common' 2>/dev/null || PATH="$(cd ../../../.. && pwd)/.venv/bin:$PATH"
source test/env_npu.sh
exec python3 -m zoo_common.launch train_performance_multinodes "$@"
