#!/usr/bin/env bash
# Runs all tests on a machine with eight simulated NPUs, on this machine's CPU:
#   bash ci/test_npu_sim.sh [--quick] [what pytest takes: paths, -k WORD, -x, ...]
# --quick leaves out the tests without the marker "device", whose subject is the same on any
# device; CI runs these. The simulated device is built at the first start, with g++.
set -euo pipefail
cd "$(dirname -- "${BASH_SOURCE[0]}")/.."

words=()
for word in "$@"; do
    case $word in
        --quick) words+=(-m device) ;;
        -h | --help)
            sed -n '2,5s/^# //p' ci/test_npu_sim.sh
            exit
            ;;
        *) words+=("$word") ;;
    esac
done

source tools/environment.sh
zoo_environment --ci
# One thread a process: two test processes already fill two cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Before the tests, so that their processes need not wait for one of them to build it.
python ci/build_npu_sim.py
exec python -m npu_sim --cards 8 python -m pytest --numprocesses=2 --dist=loadfile "${words[@]}"
