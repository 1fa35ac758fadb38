#!/usr/bin/env bash
# What takes too long for each change: all tests of faults, all tests on simulated NPUs, the real
# torch_npu on a stand-in CANN, and the pins of machines with NPUs. Each is run, and the last lines
# say what came of it.
#   bash ci/nightly.sh
set -euo pipefail
cd "$(dirname -- "${BASH_SOURCE[0]}")/.."

results=()
failed=0
for step in test_faults test_npu_sim test_torch_npu check_npu_pins; do
    echo "=== ci/$step.sh"
    started=$SECONDS
    code=0
    bash "ci/$step.sh" || code=$?
    case $step:$code in
        *:0) result=passed ;;
        check_npu_pins:3) result="passed, with stand-ins for what could not be reached" ;;
        *)
            result="failed with exit code $code"
            failed=1
            ;;
    esac
    results+=("ci/$step.sh $result, after $((SECONDS - started)) s")
    echo "=== ${results[-1]}"
done
echo "Nightly run:"
printf '  %s\n' "${results[@]}"
exit "$failed"
