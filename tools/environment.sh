# shellcheck shell=bash
# Sourced by quickstart.sh and the scripts in ci/: finds Python and makes the repository's .venv.

zoo_root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)

# Prints the name of a Python that can run the zoo. Names are tried by running them, because
# pyenv and some systems have stand-ins that do not run.
zoo_find_python() {
    local python
    for python in python3.11 python3.12 python3.13 python3.14 python3.10 python3 \
        "$zoo_root/.venv/bin/python"; do
        if "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' \
            >/dev/null 2>&1; then
            echo "$python"
            return
        fi
    done
    echo "No Python from 3.10 to 3.14 was found: install Python 3.11 and run this again." >&2
    return 1
}

# Makes .venv or finds it up to date, and makes it the active environment of this shell.
# With --ci it holds what tests and checks need, too.
zoo_environment() {
    local python
    python=$(zoo_find_python) || return
    "$python" "$zoo_root/tools/environment.py" "$@" || return
    export VIRTUAL_ENV="$zoo_root/.venv" PATH="$zoo_root/.venv/bin:$PATH"
    unset PYTHONHOME
}
