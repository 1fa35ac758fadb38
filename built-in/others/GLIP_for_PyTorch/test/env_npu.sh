# shellcheck shell=bash
# Readies this bash for Ascend NPUs: `source test/env_npu.sh`; with --show it tells what it set.
eval "$(
    set +eu
    if [ "${1-}" = --show ]; then set -- --show; else set --; fi
    dir=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd) python=python3
    if ! python3 -c 'import zoo_common' 2>/dev/null; then
        until [ -x "$dir/.venv/bin/python3" ] || [ "$dir" = / ]; do dir=$(dirname -- "$dir"); done
        [ "$dir" = / ] || python=$dir/.venv/bin/python3
    fi
    "$python" -m zoo_common.npu_env --shell "$@" 2>/dev/null || printf 'echo %q >&2; false\n' \
        "env_npu.sh: $python has no zoo-common, nothing was set; run: bash tools/quickstart.sh"
)"
