#!/usr/bin/env bash
# Runs all tests in the repository's environment, which it makes if need be:
#   bash ci/test.sh [what pytest takes: paths, -k WORD, -x, ...]
set -euo pipefail
cd "$(dirname -- "${BASH_SOURCE[0]}")/.."
source tools/environment.sh
zoo_environment --ci
# One thread a process: two test processes already fill two cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest --numprocesses=2 --dist=loadfile "$@"
