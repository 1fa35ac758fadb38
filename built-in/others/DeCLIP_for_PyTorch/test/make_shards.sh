#!/usr/bin/env bash
# The card's tree as WebDataset shards; options: bash test/make_shards.sh --help
set -euo pipefail
export ZOO_CALLER_DIR=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python3 -c 'import zoo_common' 2>/dev/null || PATH="$(cd ../../.. && pwd)/.venv/bin:$PATH"
exec python3 -m declip.make_shards "$@"
