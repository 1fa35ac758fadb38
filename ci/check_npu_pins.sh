#!/usr/bin/env bash
# Proves by pip install --dry-run that the pins of tools/pins/npu*.txt can be installed on x86-64 and
# aarch64 with every Python that they are for; a nightly job, of about 20 minutes:
#   bash ci/check_npu_pins.sh [TORCH_VERSION ...]      (all when none is named)
# The answers are kept in common/npu_sim/records/npu_pins.json.
# Exit code: 0 all resolve as pinned; 1 some do not; 3 all resolve, but PyTorch's index could not be
# reached, so that a stand-in took the place of torch's CPU build.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/../tools/environment.sh"
zoo_environment --ci
exec python "$zoo_root/ci/check_npu_pins.py" "$@"
