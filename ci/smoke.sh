#!/usr/bin/env bash
# Trains the smoke runs and asserts the scores that test/runs.yaml states:
#   bash ci/smoke.sh [MODEL_DIR ...]      (all models when none is named)
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/../tools/environment.sh"
zoo_environment --ci
exec python "$zoo_root/ci/smoke.py" "$@"
