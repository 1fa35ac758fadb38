#!/usr/bin/env bash
# Proves that a model directory is independent: copied elsewhere, with zoo-common from its wheel
# in an environment of its own, its smoke run still trains. Only the other libraries are shared.
#   bash ci/copy_out.sh [MODEL_DIR ...]      (all models when none is named)
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/../tools/environment.sh"
zoo_environment --ci
exec python "$zoo_root/ci/copy_out.py" "$@"
