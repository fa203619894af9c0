#!/usr/bin/env bash
# Runs a command until it is done: again after a crash, and not again once it was told to stop.
#
#   bash launch/until_done.sh [--restarts=N] [--delay=SECONDS] [--dry-run] -- COMMAND [ARGUMENT ...]
#
# `train` ends with 0 both when it is done and when SIGTERM made it save the last step, so that a scheduler that takes
# back a machine sees no failure.  This script tells the two apart by whether it has received the signal itself:
#
#   0    done
#   75   told to stop by a signal; the same command goes on from what was saved (75 is EX_TEMPFAIL of sysexits.h)
#   else the exit status of the last crash
set -euo pipefail

# shellcheck source=launch/words.sh
source "$(dirname "${BASH_SOURCE[0]}")/words.sh"

restarts=0 delay=10 dry=
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --restarts=*) restarts=${1#*=} ;;
    --delay=*) delay=${1#*=} ;;
    --dry-run) dry=1 ;;
    *) refuse "There is no option '$1'." ;;
  esac
  shift
done
[[ $restarts =~ ^[0-9]+$ ]] || refuse "--restarts must be a whole number.  Received: '$restarts'."
[[ $delay =~ ^[0-9]+$ ]] || refuse "--delay must be a whole number of seconds.  Received: '$delay'."
[[ $# -ge 2 ]] || refuse "After -- there must be a command."
shift

if [[ -n $dry ]]; then
  quoted "$@"
  exit
fi

told='' child=''
# Only notes the signal and passes it on: the command decides how long it takes to save.
stop() {
  told=$1
  if [[ -n $child ]]; then kill -s TERM "$child" 2> /dev/null || true; fi
}
# A shell makes what it starts with & ignore SIGINT, hence SIGTERM for all three.
for name in TERM INT HUP; do
  # shellcheck disable=SC2064  # the name is expanded now
  trap "stop $name" "$name"
done

# Runs a command to its end, however many signals come meanwhile, and sets `code`.
run() {
  "$@" &
  child=$!
  if [[ -n $told ]]; then kill -s TERM "$child" 2> /dev/null || true; fi  # it came before there was a child
  code=0
  wait "$child" || code=$?
  while kill -0 "$child" 2> /dev/null; do  # a signal ends the wait, not the command
    code=0
    wait "$child" || code=$?
  done
  child=
}

crashes=0
while true; do
  code=0
  run "$@"
  if [[ -n $told ]]; then
    echo "until_done: SIG$told came, and the command ended with $code; the same command goes on from there" >&2
    exit 75
  fi
  if [[ $code == 0 ]]; then
    exit 0
  fi
  if ((crashes >= restarts)); then
    echo "until_done: ended with $code after $crashes restarts of $restarts; giving up" >&2
    exit "$code"
  fi
  crashes=$((crashes + 1))
  echo "until_done: ended with $code; restart $crashes of $restarts in $delay s" >&2
  run sleep "$delay"
  if [[ -n $told ]]; then
    echo "until_done: SIG$told came between two attempts" >&2
    exit 75
  fi
done
