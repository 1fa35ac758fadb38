#!/usr/bin/env bash
# A run of a model on machines that ssh reaches without a password:
#
#   bash tools/cluster/ssh.sh HOST,HOST,... MODEL/test/RUN.sh [OPTION ...]
#
# The first host is machine 0; the others must reach it by the name that is given here, or by that
# of --master_addr. The repository and its environment are at the same path on all hosts. Ctrl-C or
# SIGTERM lets the run save a checkpoint and end; a lost connection does the same on that host.
set -euo pipefail

if (($# < 2)); then
    echo "usage: bash tools/cluster/ssh.sh HOST,HOST,... MODEL/test/RUN.sh [OPTION ...]" >&2
    exit 2
fi
IFS=, read -ra hosts <<<"$1"
script=$(realpath -- "$2")
shift 2
options=(--nnodes="${#hosts[@]}" --master_addr="${hosts[0]#*@}" "$@")

quote() { # in the way of every shell that a host may have
    local word
    for word in "$@"; do printf "'%s' " "${word//\'/\'\\\'\'}"; done
}

for host in "${hosts[@]}"; do
    if ! ssh -o BatchMode=yes -o ConnectTimeout=20 "$host" "$(quote test -f "$script")"; then
        echo "error: $host cannot be reached by ssh without a password, or has no $script." >&2
        exit 2
    fi
done

# What runs on a host: the launcher, and a reader of the signals to send it. The end of its input is
# the end of the connection.
# shellcheck disable=SC2016 # meant for the host
remote='
exec 3<&0 </dev/null
"$@" 3<&- &
launcher=$!
{
    while read -r -u 3 name; do kill -s "$name" "$launcher"; done
    kill -s TERM "$launcher"
} 2>/dev/null &
reader=$!
code=0
wait "$launcher" || code=$?
kill "$reader" 2>/dev/null || :
exit "$code"'

pipes=() pids=()
for rank in "${!hosts[@]}"; do
    host=${hosts[rank]}
    command=$(quote bash -c "$remote" launcher \
        bash "$script" --node_rank="$rank" "${options[@]}")
    exec {pipe}> >(
        trap '' INT # of the terminal; this script tells the hosts
        ssh -o BatchMode=yes -o ServerAliveInterval=15 "$host" "$command" 2>&1 |
            while IFS= read -r line; do printf '%s: %s\n' "$host" "$line"; done
    )
    pipes+=("$pipe") pids+=($!)
done

trap '' PIPE # a host whose launcher has ended reads no more
trap 'for pipe in "${pipes[@]}"; do echo TERM >&"$pipe" || :; done 2>/dev/null' INT TERM HUP

worst=0
for pid in "${pids[@]}"; do
    code=0
    wait "$pid" || code=$?
    while kill -0 "$pid" 2>/dev/null; do # a trap has ended the waiting, not the host's launcher
        code=0
        wait "$pid" || code=$?
    done
    worst=$((code > worst ? code : worst))
done
exit "$worst"
