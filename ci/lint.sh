#!/usr/bin/env bash
# All checks that run nothing; every one is tried, and the last line names those that failed.
#   bash ci/lint.sh
set -euo pipefail
cd "$(dirname -- "${BASH_SOURCE[0]}")/.."
source tools/environment.sh
zoo_environment --ci

failed=()
check() {
    local name=$1
    shift
    echo "--- $name"
    "$@" || failed+=("$name")
}

mapfile -d '' -t shell_files < <(find . -name '.venv*' -prune -o -name .git -prune -o -type f \
    \( -name '*.sh' -o -name '*.sbatch' -o -path './.ci/run' \) -print0 | sort -zu)

check ruff ruff check .
check format ruff format --check .
check mypy mypy common/zoo_common common/npu_sim/npu_sim
check shellcheck shellcheck --external-sources "${shell_files[@]}"
check codespell codespell
check imports lint-imports
check layout python tools/check_layout.py
check tables python tools/tables.py --check
check pins python tools/lock.py --check

if ((${#failed[@]})); then
    echo "lint: failed: ${failed[*]}"
    exit 1
fi
echo "lint: all passed"
