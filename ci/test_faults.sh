#!/usr/bin/env bash
# Breaks whole runs on purpose and looks at what is left; all of it takes long:
#   bash ci/test_faults.sh [--quick] [what pytest takes: paths, -k WORD, -x, ...]
# --quick leaves out what takes long (marker "thorough"); CI runs this. Tests that measure (marker
# "alone") run after the others, with nothing beside them.
set -euo pipefail
cd "$(dirname -- "${BASH_SOURCE[0]}")/.."

only="" words=()
for word in "$@"; do
    case $word in
        --quick) only=" and not thorough" ;;
        -h | --help)
            sed -n '2,5s/^# //p' ci/test_faults.sh
            exit
            ;;
        *) words+=("$word") ;;
    esac
done

source tools/environment.sh
zoo_environment --ci
# One thread a process: the runs have several processes already.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

found=0
tests() {
    local code=0
    python -m pytest "$@" || code=$?
    case $code in
        0) found=1 ;;
        5) ;; # pytest found no test among those that were asked for
        *) exit "$code" ;;
    esac
}
# Without a path among the words, pytest takes the directory.
has_path=0
for word in "${words[@]}"; do
    [[ -e ${word%%::*} ]] && has_path=1
done
((has_path)) || words+=(tests/faults)
tests --numprocesses=2 --dist=loadfile -m "not alone$only" "${words[@]}"
tests --numprocesses=0 -m "alone$only" "${words[@]}"
if ((!found)); then
    echo "ci/test_faults.sh: no test was found" >&2
    exit 5
fi
