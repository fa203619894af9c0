#!/usr/bin/env bash
# Trains on Cloud TPU VMs, one host or a pod, from a machine that has gcloud.  Start it in the repository's root.
#
#   bash launch/tpu_vm.sh create  --name=NAME --zone=ZONE --topology=v5e:8x8 [--spot] [--queued] [-- GCLOUD_FLAG ...]
#   bash launch/tpu_vm.sh install --name=NAME --zone=ZONE [--repo=URL [--ref=REF]]
#   bash launch/tpu_vm.sh run     --name=NAME --zone=ZONE CONFIG.py --workdir=gs://BUCKET/DIR [--config.KEY=VALUE ...]
#   bash launch/tpu_vm.sh status  --name=NAME --zone=ZONE [--queued]
#   bash launch/tpu_vm.sh stop    --name=NAME --zone=ZONE
#   bash launch/tpu_vm.sh collect --name=NAME --zone=ZONE --workdir=gs://BUCKET/DIR --to=DIR
#   bash launch/tpu_vm.sh delete  --name=NAME --zone=ZONE [--queued]
#
# All take --project=PROJECT, and --dry-run, which prints the commands and runs none.  docs/launch.md explains the steps.
#
# `run` starts the command on all hosts and returns.  Each host restarts it after a crash (--restarts=N), until it is done
# or told to stop.  All hosts must see one workdir, in a bucket or on a disk that they share.  Any other gs://BUCKET/...
# among the arguments becomes /mnt/gcs/BUCKET/..., where `run` mounts the bucket.  When a spot slice is taken back its VMs
# are gone; create, install and run again with the same workdir, and training goes on.
set -euo pipefail

commands="create install run status stop collect delete"
# shellcheck source=launch/words.sh
source "$(dirname "${BASH_SOURCE[0]}")/words.sh"

# Runs a command, or prints it.
act() {
  if [[ -n $dry ]]; then
    quoted "$@"
  else
    "$@"
  fi
}

# On a host: goes on only if nothing runs there.  The lock is held as long as any process of a run lives.
free="mkdir -p virl_jax_run && { flock --nonblock virl_jax_run/lock true ||\
 { echo \"\$(hostname) is running; stop it first\" >&2; exit 3; }; }"

# Runs a shell command line on worker $1 (or all).
on() {
  act gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"
}

# Taken wherever it is, because a run that is meant to be dry must never be a real one.
dry='' words=()
for word in "$@"; do
  if [[ $word == --dry-run ]]; then dry=1; else words+=("$word"); fi
done
set -- ${words[@]+"${words[@]}"}

command=${1:-}
[[ -n $command && " $commands " == *" $command "* ]] ||
  refuse "The first argument must be one of: $commands.  Received: '$command'."
shift

name='' zone='' project='' topology='' version='' spot='' queued='' repo='' ref=HEAD restarts=5 workdir='' to=''
config='' extra=() train=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    *)
      case $command:$1 in
        create:--topology=*) topology=${1#*=} ;;
        create:--version=*) version=${1#*=} ;;
        create:--spot) spot=1 ;;
        create:--queued | status:--queued | delete:--queued) queued=1 ;;
        create:--)
          shift
          extra=("$@")
          break
          ;;
        install:--repo=*) repo=${1#*=} ;;
        install:--ref=*) ref=${1#*=} ;;
        run:--restarts=*) restarts=${1#*=} ;;
        collect:--workdir=*) workdir=${1#*=} ;;
        collect:--to=*) to=${1#*=} ;;
        run:-*) refuse "'$command' has no option '$1'; what goes to train follows the config file." ;;
        run:*)
          config=$1
          shift
          train=("$@")
          break
          ;;
        *) refuse "'$command' has no option '$1'." ;;
      esac
      ;;
  esac
  shift
done
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
  refuse "--name must be lower-case letters, digits and hyphens, a letter first.  Received: '$name'."
[[ -n $zone ]] || refuse "--zone must be a zone that has TPUs, such as us-west4-a.  Received: ''."
where=(--zone="$zone")
if [[ -n $project ]]; then where+=(--project="$project"); fi
if [[ -z $dry ]] && ! command -v gcloud > /dev/null; then
  refuse "There is no gcloud here.  It comes with the Google Cloud CLI: https://cloud.google.com/sdk/docs/install"
fi

# --- create ------------------------------------------------------------------------------------------------------------
# Sets `type` and, unless it is given, `version` from a topology as `virl_jax.plan` writes it.
machine() {
  local kind=${topology%%:*} shape=${topology#*:} chips=1 side default
  local wanted="--topology must be v4, v5e, v5p or v6e, a colon and the slice, such as v5e:8x8 or v5p:2x2x4."
  [[ $topology == *:* && $shape =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || refuse "$wanted  Received: '$topology'."
  for side in ${shape//x/ }; do chips=$((chips * side)); done
  case $kind in  # v4 and v5p are named by their cores, of which a chip has two
    v4) type=v4-$((2 * chips)) default=tpu-ubuntu2204-base ;;
    v5e) type=v5litepod-$chips default=v2-alpha-tpuv5-lite ;;
    v5p) type=v5p-$((2 * chips)) default=v2-alpha-tpuv5 ;;
    v6e) type=v6e-$chips default=v2-alpha-tpuv6e ;;
    *) refuse "$wanted  Received: '$topology'." ;;
  esac
  version=${version:-$default}
}

create() {
  machine
  local flags=(--accelerator-type="$type")
  if [[ -n $spot ]]; then flags+=(--spot); fi
  if [[ -n $queued ]]; then
    act gcloud compute tpus queued-resources create "$name" --node-id="$name" "${where[@]}" "${flags[@]}" \
      --runtime-version="$version" ${extra[@]+"${extra[@]}"}
  else
    act gcloud compute tpus tpu-vm create "$name" "${where[@]}" "${flags[@]}" --version="$version" \
      ${extra[@]+"${extra[@]}"}
  fi
}

# --- install -----------------------------------------------------------------------------------------------------------
install() {
  if [[ -n $repo ]]; then
    local clone
    clone=$(quoted git clone --quiet "$repo" virl_jax)
    on all "$free && rm -rf virl_jax && $clone && git -C virl_jax checkout --quiet $(quoted "$ref")"
  else
    [[ -f setup.py && -d virl_jax ]] || refuse "install copies the repository: start it in its root, not in $PWD."
    local archive=${TMPDIR:-/tmp}/virl_jax-$name.tar.gz
    if [[ -z $dry && -n $(git status --porcelain) ]]; then
      echo "What is not committed is not copied: $(git status --porcelain | wc -l) paths differ from $ref." >&2
    fi
    act git archive --format=tar.gz --output="$archive" "$ref"
    act gcloud compute tpus tpu-vm scp "$archive" "$name:virl_jax.tar.gz" "${where[@]}" --worker=all
    on all "$free && rm -rf virl_jax && mkdir virl_jax && tar -xzf virl_jax.tar.gz -C virl_jax"
  fi
  # The system's Python is older than 3.11; uv installs one of its own.
  on all "python3 -m pip install --quiet --user uv && cd virl_jax && ~/.local/bin/uv venv --quiet --python=3.12 .venv\
 && ~/.local/bin/uv pip install --quiet --python=.venv/bin/python '.[tpu,gcs]'"
  local packages=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
  on all "command -v gcsfuse || { curl -fsS $packages/doc/apt-key.gpg | sudo tee $key > /dev/null\
 && echo \"deb [signed-by=$key] $packages gcsfuse-\$(lsb_release -cs) main\" | sudo tee /etc/apt/sources.list.d/gcsfuse.list\
 && sudo apt-get update -qq && sudo apt-get install -y -qq gcsfuse; }"
}

# --- run ---------------------------------------------------------------------------------------------------------------
# The path of a gs:// address on a host.  Sets `mounted`, and adds to `buckets` what must be mounted for it.
mount_of() {
  mounted=$1
  if [[ $1 =~ ^(--[A-Za-z0-9_.-]+=)?gs://([a-z0-9][a-z0-9._-]*)(/.*)?$ ]]; then
    mounted=${BASH_REMATCH[1]}/mnt/gcs/${BASH_REMATCH[2]}${BASH_REMATCH[3]}
    if [[ " $buckets " != *" ${BASH_REMATCH[2]} "* ]]; then buckets+=" ${BASH_REMATCH[2]}"; fi
  elif [[ $1 == *gs://* ]]; then
    refuse "A bucket's address must look like gs://BUCKET/DIR.  Received: '$1'."
  fi
}

run() {
  [[ -n $config ]] || refuse "run must be given a config file, such as configs/tiny.py."
  [[ -f $config && $config != /* && $config != ../* ]] ||
    refuse "The config file must lie in the repository, as the hosts have that alone.  Received: '$config' (in $PWD)."
  [[ $restarts =~ ^[0-9]+$ ]] || refuse "--restarts must be a whole number.  Received: '$restarts'."
  local arguments=() argument mounted buckets='' bucket mounts='' shared=''
  for argument in ${train[@]+"${train[@]}"}; do
    # train writes its workdir to a bucket directly; anything else in a bucket it reads as files.
    if [[ $argument =~ ^--workdir=(/|gs://[a-z0-9][a-z0-9._-]*/) ]]; then
      shared=1 mounted=$argument
    else
      mount_of "$argument"
    fi
    arguments+=("$mounted")
  done
  [[ -n $shared ]] ||
    refuse "--workdir= must be what all hosts see: gs://BUCKET/DIR, or an absolute path on a disk that they share."
  for bucket in $buckets; do
    # No caches, so that hosts see at once what is put there.
    mounts+=" && { mountpoint -q /mnt/gcs/$bucket || { sudo mkdir -p /mnt/gcs/$bucket && sudo chown \"\$USER\" /mnt/gcs/$bucket\
 && gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0\
 $bucket /mnt/gcs/$bucket; }; }"
  done
  local line
  line=$(quoted bash launch/until_done.sh --restarts="$restarts" -- .venv/bin/python -m virl_jax.train --config="$config" \
    "${arguments[@]}")
  # nohup and flock exec until_done, so that it is the process whose number is written down and that holds the lock.
  on all "$free && cd virl_jax$mounts\
 && { JAX_PLATFORMS=tpu,cpu VIRL_JAX_DISTRIBUTED=auto nohup flock --nonblock --no-fork ../virl_jax_run/lock $line\
 > ../virl_jax_run/log 2>&1 < /dev/null & echo \$! > ../virl_jax_run/pid; }"
}

# --- the rest ----------------------------------------------------------------------------------------------------------
status() {
  if [[ -n $queued ]]; then
    act gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)'
  fi
  act gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state,health)'
  on all "cd virl_jax_run && echo \"\$(hostname): \$(flock --nonblock lock echo not running || echo running)\" && tail -n 3 log"
}

stop() {  # until_done passes SIGTERM on, and train saves the last finished step
  on all "cd virl_jax_run && { flock --nonblock lock echo \"nothing runs on \$(hostname)\" || kill -s TERM \$(cat pid); }"
}

collect() {
  [[ -n $to ]] || refuse "--to must be a folder here.  Received: ''."
  case $workdir in
    gs://*)
      act mkdir -p "$to"
      act gcloud storage rsync --recursive "$workdir" "$to"
      ;;
    '') refuse "--workdir must be what run was given.  Received: ''." ;;
    *) act gcloud compute tpus tpu-vm scp "$name:$workdir" "$to" "${where[@]}" --worker=0 --recurse ;;
  esac
}

delete() {
  if [[ -n $queued ]]; then
    act gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force
  else
    act gcloud compute tpus tpu-vm delete "$name" "${where[@]}"
  fi
}

"$command"
