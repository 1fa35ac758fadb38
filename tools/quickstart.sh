#!/usr/bin/env bash
# From nothing to a trained model: `bash tools/quickstart.sh --help` tells more.
set -euo pipefail
# shellcheck source=tools/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
python=$(zoo_find_python)
exec "$python" "$zoo_root/tools/quickstart.py" "$@"
