"""Trains on Google Kubernetes Engine: makes a JobSet for a TPU slice or for GPU nodes, and gives it to kubectl.

    python launch/gke/jobset.py --config=configs/v7b.py --topology=v5e:8x8 --image=IMAGE --bucket=gs://BUCKET --name=v7b
    python launch/gke/jobset.py --config=configs/v7b.py --topology=h100:8x4 ...       (4 nodes of 8 GPUs)

With --dry-run it prints the YAML and starts nothing.  Options that it does not know, such as --config.KEY=VALUE, go to
train; every gs:// address among them must be in the bucket, which pods see under /mnt/gcs.  The run's workdir is
BUCKET/runs/NAME, and is written there without the mount.

Each host has one pod, which is one process.  When a node is drained, SIGTERM makes train save the last finished step;
launch/until_done.sh then ends with 75, and the JobSet starts all pods again without counting it.  Crashes count.  The
image is launch/Dockerfile's.  The cluster needs JobSet 0.8 and the Cloud Storage FUSE driver; docs/launch.md says more.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import shutil
import subprocess
import sys

STOPPED = 75       # until_done.sh: told to stop by a signal, and saved
UID = 1000         # the image's user
PORT = 8476        # where JAX's coordinator listens
MOUNT = "/mnt/gcs"
JOB = "worker"     # the JobSet's only job; part of its pods' names

# GKE's names of chips, and the slices that it has; None: any 3D slice of whole hosts.
_FLAT = {"1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"}
TPUS = {"v5e": ("tpu-v5-lite-podslice", _FLAT), "v5p": ("tpu-v5p-slice", None), "v6e": ("tpu-v6e-slice", _FLAT)}
GPUS = {"a100-40": "nvidia-tesla-a100", "a100-80": "nvidia-a100-80gb", "h100": "nvidia-h100-80gb",
        "h100-mega": "nvidia-h100-mega-80gb", "h200": "nvidia-h200-141gb"}


@dataclasses.dataclass(frozen=True)
class Machine:
  """Which nodes, and how many.

  Attributes:
    hosts: how many nodes, of one pod each.
    resource: what a pod is given, "google.com/tpu" or "nvidia.com/gpu".
    chips: how many of it a pod is given.
    selector: the labels of such nodes.
  """

  hosts: int
  resource: str
  chips: int
  selector: dict[str, str]


def machine(topology: str) -> Machine:
  """Reads "v5e:8x8", "v5p:2x2x4", "h100:8" (one node), "h100:8x4" (four nodes of eight).

  Raises:
    ValueError: there is no such machine.
  """
  kind, _, shape = topology.partition(":")
  sides = [int(n) for n in shape.split("x")] if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) else []
  if kind in TPUS:
    label, slices = TPUS[kind]
    count = math.prod(sides)
    known = shape in slices if slices else len(sides) == 3 and count % 4 == 0
    if not known:
      wanted = f"one of {', '.join(sorted(slices, key=_size))}" if slices else "AxBxC, four chips a host, such as 2x2x4"
      raise ValueError(f"--topology={kind}: must be followed by a slice that GKE has, {wanted}. Received: {topology!r}")
    chips = count if count <= 8 and slices else 4  # slices of up to eight chips are one host; else hosts have four
    return Machine(count // chips, "google.com/tpu", chips,
                   {"cloud.google.com/gke-tpu-accelerator": label, "cloud.google.com/gke-tpu-topology": shape})
  if kind in GPUS and len(sides) in (1, 2) and sides[0] <= 16:
    return Machine(sides[1] if len(sides) == 2 else 1, "nvidia.com/gpu", sides[0],
                   {"cloud.google.com/gke-accelerator": GPUS[kind]})
  raise ValueError(f"--topology must be one of {', '.join(TPUS)} with a slice, as v5e:8x8, or one of {', '.join(GPUS)} "
                   f"with GPUs a node and nodes, as h100:8x4. Received: {topology!r}")


def _size(shape: str) -> int:
  return math.prod(map(int, shape.split("x")))


def jobset(name: str, image: str, config: str, topology: str, bucket: str, restarts: int, grace_s: int, spot: bool,
           service_account: str, train: list[str]) -> dict:
  """The JobSet, as jobset.x-k8s.io/v1alpha2 has it.

  Args:
    name: of the JobSet, and of the run's folder in the bucket.
    image: what pods run.
    config: the configuration's file, in the image.
    topology: see `machine`.
    bucket: "gs://BUCKET" or "gs://BUCKET/DIR".
    restarts: how many crashes are tried again.
    grace_s: seconds from SIGTERM to SIGKILL.
    spot: whether the nodes are spot ones.
    service_account: of Kubernetes, which may write to the bucket.
    train: further arguments of train.

  Raises:
    ValueError: an argument is not valid.
  """
  if not re.fullmatch(r"[a-z]([a-z0-9-]{,38}[a-z0-9])?", name):
    raise ValueError("--name must be at most 40 lower-case letters, digits and hyphens, a letter first. Received: "
                     f"{name!r}")
  if not (found := re.fullmatch(r"gs://([a-z0-9][a-z0-9._-]+)((?:/[^/]+)*)/?", bucket)):
    raise ValueError(f"--bucket must be gs://BUCKET or gs://BUCKET/DIR. Received: {bucket!r}")
  m = machine(topology)
  gpu, several = m.resource == "nvidia.com/gpu", m.hosts > 1
  command = ["python", "-m", "virl_jax.train", f"--config={config}",
             f"--workdir=gs://{found[1]}{found[2]}/runs/{name}", *(_inside(word, found[1]) for word in train)]
  env = {"JAX_PLATFORMS": "cuda,cpu" if gpu else "tpu,cpu"}
  if gpu:
    env["LD_LIBRARY_PATH"] = "/usr/local/nvidia/lib64"  # where GKE puts the driver's libraries
    env["XLA_FLAGS"] = "--xla_gpu_enable_latency_hiding_scheduler=true"  # lets collectives overlap with computation
  if gpu and several:  # Kubernetes sets JOB_COMPLETION_INDEX; names of pods can be resolved before the pods are ready
    command += [f"--coordinator={name}-{JOB}-0-0.{name}:{PORT}", f"--num_processes={m.hosts}",
                "--process_id=$(JOB_COMPLETION_INDEX)"]
  elif several:
    env["VIRL_JAX_DISTRIBUTED"] = "auto"  # GKE tells JAX who the others are

  volumes = {
      # For data and weights; train writes its workdir to the bucket directly.  No caches: pods see at once what is put
      # there.
      "bucket": (MOUNT, {"csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": {
          "bucketName": found[1],
          "mountOptions": f"implicit-dirs,uid={UID},gid={UID},file-system:rename-dir-limit:200000,"
                          "metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0"}}}),
      # NCCL and the workers that decode images share memory, of which a container has 64 MiB by default.
      "shm": ("/dev/shm", {"emptyDir": {"medium": "Memory"}})}
  pod = {
      "restartPolicy": "Never",  # only all pods together can be started again
      "terminationGracePeriodSeconds": grace_s,
      "serviceAccountName": service_account,
      "securityContext": {"runAsUser": UID, "runAsGroup": UID, "runAsNonRoot": True},
      "nodeSelector": m.selector | ({"cloud.google.com/gke-spot": "true"} if spot else {}),
      **({"tolerations": [{"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true",
                           "effect": "NoSchedule"}]} if spot else {}),
      "containers": [{
          "name": "train", "image": image,
          "command": ["bash", "launch/until_done.sh", "--"], "args": command,
          "env": [{"name": k, "value": v} for k, v in env.items()],
          "resources": {"limits": {m.resource: m.chips}},
          "volumeMounts": [{"name": k, "mountPath": path} for k, (path, _) in volumes.items()]}],
      "volumes": [{"name": k} | what for k, (_, what) in volumes.items()]}
  job = {
      "completionMode": "Indexed", "completions": m.hosts, "parallelism": m.hosts,
      "backoffLimit": 0,  # a single process cannot rejoin the others
      "podFailurePolicy": {"rules": [
          {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": [STOPPED]}},
          {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]},
      "template": {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}, "spec": pod}}
  return {
      "apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet",
      "metadata": {"name": name, **({} if gpu else {"annotations": {  # all pods in one slice
          "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}})},
      "spec": {
          "failurePolicy": {
              "maxRestarts": restarts,
              "restartStrategy": "BlockingRecreate",  # a workdir is for one run at a time
              "rules": [{"name": "stopped", "action": "RestartJobSetAndIgnoreMaxRestarts",
                         "onJobFailureReasons": ["PodFailurePolicy"]}]},
          "replicatedJobs": [{"name": JOB, "replicas": 1, "template": {"spec": job}}]}}


def _inside(word: str, bucket: str) -> str:
  """An argument as a container needs it: addresses in the bucket become paths of the mount, and $( is escaped."""
  place, address, rest = word.partition("gs://")
  if address:
    owner, _, path = rest.partition("/")
    if owner != bucket:
      raise ValueError(f"pods see gs://{bucket} alone, that of --bucket. Received: {word!r}")
    word = f"{place}{MOUNT}/{path}"
  return word.replace("$(", "$$(")


class _Parser(argparse.ArgumentParser):

  def error(self, message):
    raise ValueError(message)


def main(argv: list[str]) -> int:
  parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
  parser.add_argument("--config", required=True, help="the configuration's file, in the image")
  parser.add_argument("--topology", required=True, help="v5e:8x8, v5p:2x2x4, v6e:4x4, h100:8x4, ...")
  parser.add_argument("--image", required=True, help="of launch/Dockerfile, where the cluster can pull it")
  parser.add_argument("--bucket", required=True, help="gs://BUCKET or gs://BUCKET/DIR")
  parser.add_argument("--name", required=True, help="of the JobSet and of the run")
  parser.add_argument("--restarts", type=int, default=5, help="how many crashes are tried again")
  parser.add_argument("--grace_s", type=int, default=600, help="seconds to save in, from SIGTERM on")
  parser.add_argument("--spot", action="store_true", help="whether the nodes are spot ones")
  parser.add_argument("--service_account", default="default", help="of Kubernetes, which may write to the bucket")
  parser.add_argument("--dry-run", action="store_true", help="print the YAML, start nothing")
  try:
    args, train = parser.parse_known_args(argv)
    if not os.path.isfile(args.config) or os.path.isabs(args.config):
      raise ValueError("--config must be a file of the repository, such as configs/v7b.py, from whose root this is "
                       f"started. Received: {args.config!r}")
    if wrong := [word for word in train if not word.startswith("--") or word.startswith("--workdir")]:
      raise ValueError(f"what goes to train must look like --config.KEY=VALUE, and --name says where the run lives. "
                       f"Received: {wrong[0]!r}")
    made = jobset(args.name, args.image, args.config, args.topology, args.bucket, args.restarts, args.grace_s,
                  args.spot, args.service_account, train)
    try:
      import yaml
    except ImportError as e:
      raise ValueError("there is no PyYAML here: pip install 'virl-jax[launch]'") from e
    text = yaml.safe_dump(made, sort_keys=False, width=120)
    if args.dry_run:
      print(f"# kubectl apply --filename=-\n{text}", end="")
      return 0
    if not shutil.which("kubectl"):
      raise ValueError("there is no kubectl here. It comes with the Google Cloud CLI: "
                       "gcloud components install kubectl")
  except ValueError as e:
    print(f"error: {e}", file=sys.stderr)
    return 2
  return subprocess.run(["kubectl", "apply", "--filename=-"], input=text, text=True).returncode


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
