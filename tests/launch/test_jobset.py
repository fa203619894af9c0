"""The JobSet for Google Kubernetes Engine, field by field."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import jsonschema
import pytest
import yaml

from virl_jax.run import topologies

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = "launch/gke/jobset.py"
GOOD = {"config": "configs/v7b.py", "topology": "v5e:8x8", "image": "registry/virl_jax:1", "bucket": "gs://my-bucket",
        "name": "v7b"}

_spec = importlib.util.spec_from_file_location("jobset", ROOT / SCRIPT)
jobset = importlib.util.module_from_spec(_spec)
sys.modules["jobset"] = jobset  # dataclasses look their module up
_spec.loader.exec_module(jobset)


def _fields(required: dict, optional: dict | None = None) -> dict:
  """The schema of an object with these fields and no others."""
  return {"type": "object", "properties": required | (optional or {}), "required": list(required),
          "additionalProperties": False}


_TEXT, _COUNT, _WHOLE = {"type": "string"}, {"type": "integer", "minimum": 1}, {"type": "integer", "minimum": 0}
_TEXTS, _MAP = {"type": "array", "items": _TEXT}, {"type": "object", "additionalProperties": _TEXT}
_LIST = lambda items: {"type": "array", "items": items, "minItems": 1}

# What we use of jobset.x-k8s.io/v1alpha2, of batch/v1's Job and of core/v1's Pod, as their API references have it.
_POD = _fields({
    "restartPolicy": {"const": "Never"}, "terminationGracePeriodSeconds": _COUNT, "serviceAccountName": _TEXT,
    "securityContext": _fields({"runAsUser": _COUNT, "runAsGroup": _COUNT, "runAsNonRoot": {"const": True}}),
    "nodeSelector": _MAP,
    "containers": _LIST(_fields({
        "name": _TEXT, "image": _TEXT, "command": _TEXTS, "args": _TEXTS,
        "env": _LIST(_fields({"name": _TEXT, "value": _TEXT})),
        "resources": _fields({"limits": {"type": "object", "additionalProperties": _COUNT, "minProperties": 1}}),
        "volumeMounts": _LIST(_fields({"name": _TEXT, "mountPath": {"type": "string", "pattern": "^/"}}))})),
    "volumes": _LIST({"oneOf": [
        _fields({"name": _TEXT, "csi": _fields({"driver": _TEXT, "volumeAttributes": _MAP})}),
        _fields({"name": _TEXT, "emptyDir": _fields({"medium": {"const": "Memory"}})})]}),
}, {"tolerations": _LIST(_fields({"key": _TEXT, "operator": {"enum": ["Equal", "Exists"]}, "value": _TEXT,
                                  "effect": {"enum": ["NoSchedule", "NoExecute", "PreferNoSchedule"]}}))})
_JOB = _fields({
    "completionMode": {"const": "Indexed"}, "completions": _COUNT, "parallelism": _COUNT, "backoffLimit": _WHOLE,
    "podFailurePolicy": _fields({"rules": _LIST({"oneOf": [
        _fields({"action": {"const": "FailJob"}, "onExitCodes": _fields({
            "containerName": _TEXT, "operator": {"enum": ["In", "NotIn"]}, "values": _LIST(_COUNT)})}),
        _fields({"action": {"const": "FailJob"}, "onPodConditions": _LIST(_fields({
            "type": {"const": "DisruptionTarget"}, "status": {"enum": ["True", "False", "Unknown"]}}))})]})}),
    "template": _fields({"metadata": _fields({"annotations": _MAP}), "spec": _POD})})
_JOBSET = _fields({
    "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"}, "kind": {"const": "JobSet"},
    "metadata": _fields({"name": {"type": "string", "pattern": "^[a-z]([a-z0-9-]*[a-z0-9])?$"}}, {"annotations": _MAP}),
    "spec": _fields({
        "failurePolicy": _fields({
            "maxRestarts": _WHOLE, "restartStrategy": {"enum": ["Recreate", "BlockingRecreate"]},
            "rules": _LIST(_fields({
                "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                "action": {"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
                "onJobFailureReasons": _LIST({"enum": ["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes",
                                                       "MaxFailedIndexesExceeded", "PodFailurePolicy"]})}))}),
        "replicatedJobs": _LIST(_fields({"name": _TEXT, "replicas": _COUNT,
                                         "template": _fields({"spec": _JOB})}))})})


def run(*args, cwd=ROOT, env=None, **flags):
  given = [f"--{k}={v}" for k, v in (GOOD | flags).items() if v is not None]
  return subprocess.run([sys.executable, SCRIPT, *given, *args], cwd=cwd, env=env, capture_output=True, text=True,
                        timeout=60)


def made(*args, **flags) -> dict:
  done = run(*args, "--dry-run", **flags)
  assert done.returncode == 0 and not done.stderr, done.stderr
  result = yaml.safe_load(done.stdout)
  jsonschema.validate(result, _JOBSET)
  return result


def job(result: dict) -> dict:
  return result["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod(result: dict) -> dict:
  return job(result)["template"]["spec"]


def container(result: dict) -> dict:
  return pod(result)["containers"][0]


def environment(result: dict) -> dict:
  return {e["name"]: e["value"] for e in container(result)["env"]}


@pytest.mark.parametrize("topology, hosts, chips, label", [
    ("v5e:1x1", 1, 1, "tpu-v5-lite-podslice"), ("v5e:2x2", 1, 4, "tpu-v5-lite-podslice"),
    ("v5e:2x4", 1, 8, "tpu-v5-lite-podslice"), ("v5e:4x4", 4, 4, "tpu-v5-lite-podslice"),
    ("v5e:8x8", 16, 4, "tpu-v5-lite-podslice"), ("v6e:4x4", 4, 4, "tpu-v6e-slice"),
    ("v5p:2x2x1", 1, 4, "tpu-v5p-slice"), ("v5p:2x2x2", 2, 4, "tpu-v5p-slice"), ("v5p:2x2x4", 4, 4, "tpu-v5p-slice")])
def test_a_slice_has_a_pod_a_host(topology, hosts, chips, label):
  result = made(topology=topology)
  assert job(result)["completions"] == job(result)["parallelism"] == hosts
  assert container(result)["resources"] == {"limits": {"google.com/tpu": chips}}
  assert pod(result)["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": label,
                                         "cloud.google.com/gke-tpu-topology": topology.partition(":")[2]}
  # All pods of a job are in one slice, not in several that happen to be free.
  assert result["metadata"]["annotations"] == {
      "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
  assert environment(result) == {"JAX_PLATFORMS": "tpu,cpu"} | (
      {"VIRL_JAX_DISTRIBUTED": "auto"} if hosts > 1 else {})
  assert not [a for a in container(result)["args"] if "process" in a or "coordinator" in a]


@pytest.mark.parametrize("topology, hosts, chips, label", [
    ("h100:8", 1, 8, "nvidia-h100-80gb"), ("h100:8x4", 4, 8, "nvidia-h100-80gb"),
    ("a100-40:4x2", 2, 4, "nvidia-tesla-a100"), ("h200:8x16", 16, 8, "nvidia-h200-141gb")])
def test_gpu_nodes_have_a_pod_each(topology, hosts, chips, label):
  result = made(topology=topology, name="my-run")
  assert job(result)["completions"] == job(result)["parallelism"] == hosts
  assert container(result)["resources"] == {"limits": {"nvidia.com/gpu": chips}}
  assert pod(result)["nodeSelector"] == {"cloud.google.com/gke-accelerator": label}
  assert "annotations" not in result["metadata"]
  assert environment(result) == {"JAX_PLATFORMS": "cuda,cpu", "LD_LIBRARY_PATH": "/usr/local/nvidia/lib64",
                                 "XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=true"}
  several = [f"--num_processes={hosts}", "--process_id=$(JOB_COMPLETION_INDEX)"]
  # The first pod's name, as JobSet's own service has it: JOBSET-JOB-REPLICA-INDEX.JOBSET.
  assert [a for a in container(result)["args"] if "process" in a or "coordinator" in a] == (
      ["--coordinator=my-run-worker-0-0.my-run:8476", *several] if hosts > 1 else [])


def test_the_command_and_where_the_run_lives():
  result = made("--config.data.path=gs://my-bucket/r.jsonl", "--config.note=$(HOME) $HOME",
                bucket="gs://my-bucket/team/a/")
  c = container(result)
  assert c["command"] == ["bash", "launch/until_done.sh", "--"] and c["image"] == "registry/virl_jax:1"
  assert c["args"] == ["python", "-m", "virl_jax.train", "--config=configs/v7b.py",
                       "--workdir=gs://my-bucket/team/a/runs/v7b", "--config.data.path=/mnt/gcs/r.jsonl",
                       "--config.note=$$(HOME) $HOME"]  # Kubernetes replaces $(...) and gives $$( back as $(
  volumes = {v["name"]: v for v in pod(result)["volumes"]}
  mounts = {m["name"]: m["mountPath"] for m in c["volumeMounts"]}
  assert mounts == {"bucket": "/mnt/gcs", "shm": "/dev/shm"} and set(volumes) == set(mounts)
  csi = volumes["bucket"]["csi"]
  assert csi["driver"] == "gcsfuse.csi.storage.gke.io" and csi["volumeAttributes"]["bucketName"] == "my-bucket"
  options = csi["volumeAttributes"]["mountOptions"].split(",")
  assert {"implicit-dirs", "uid=1000", "gid=1000", "metadata-cache:ttl-secs:0"} <= set(options)
  assert job(result)["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}


def test_the_user_is_the_images():
  lines = (ROOT / "launch" / "Dockerfile").read_text().splitlines()
  user = next(line.split()[1] for line in lines if line.startswith("USER "))
  assert pod(made())["securityContext"] == {"runAsUser": int(user), "runAsGroup": int(user), "runAsNonRoot": True}


def test_a_run_that_was_told_to_stop_is_started_again_uncounted_and_a_crash_is_counted():
  result = made(restarts=7)
  policy = result["spec"]["failurePolicy"]
  assert policy["maxRestarts"] == 7 and policy["restartStrategy"] == "BlockingRecreate"
  assert [(r["action"], r["onJobFailureReasons"]) for r in policy["rules"]] == [
      ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])]
  exits, conditions = job(result)["podFailurePolicy"]["rules"]
  assert exits["onExitCodes"] == {"containerName": container(result)["name"], "operator": "In", "values": [75]}
  assert conditions["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
  assert job(result)["backoffLimit"] == 0 and pod(result)["restartPolicy"] == "Never"
  assert "exit 75" in (ROOT / "launch" / "until_done.sh").read_text()


def test_time_to_save():
  assert pod(made())["terminationGracePeriodSeconds"] == 600
  assert pod(made(grace_s=60))["terminationGracePeriodSeconds"] == 60


def test_spot_nodes():
  result = made("--spot")
  assert pod(result)["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  assert [t["key"] for t in pod(result)["tolerations"]] == ["cloud.google.com/gke-spot"]
  assert "tolerations" not in pod(made())


def test_chips_are_called_as_plan_calls_them():
  assert set(jobset.TPUS) | set(jobset.GPUS) - {"h100-mega"} <= set(topologies.CHIPS)


def test_it_is_given_to_kubectl(stand_in):
  path = stand_in(kubectl='echo "$@"; cat')
  done = run(env=os.environ | {"PATH": f"{path}:{os.environ['PATH']}"})
  first, _, text = done.stdout.partition("\n")
  assert done.returncode == 0 and first == "apply --filename=-" and yaml.safe_load(text) == made()
  path = stand_in(kubectl="exit 5")
  assert run(env=os.environ | {"PATH": f"{path}:{os.environ['PATH']}"}).returncode == 5


@pytest.mark.parametrize("args, flags, message", [
    ((), {"topology": "v5e:3x3"}, "--topology=v5e: must be followed by a slice that GKE has, one of 1x1, 2x2, 2x4, "
     "4x4, 4x8, 8x8, 8x16, 16x16. Received: 'v5e:3x3'"),
    ((), {"topology": "v5p:2x2"}, "--topology=v5p: must be followed by a slice that GKE has, AxBxC, four chips a host, "
     "such as 2x2x4. Received: 'v5p:2x2'"),
    *(((), {"topology": t}, "--topology must be one of v5e, v5p, v6e with a slice, as v5e:8x8, or one of a100-40, "
       f"a100-80, h100, h100-mega, h200 with GPUs a node and nodes, as h100:8x4. Received: '{t}'")
      for t in ("rtx4090:1", "h100", "h100:8x4x2", "h100:0", "h100:64")),
    ((), {"config": "configs/none.py"}, "--config must be a file of the repository, such as configs/v7b.py, from whose "
     "root this is started. Received: 'configs/none.py'"),
    ((), {"name": "V7B"}, "--name must be at most 40 lower-case letters, digits and hyphens, a letter first. "
     "Received: 'V7B'"),
    ((), {"name": "a" * 41}, "--name must be at most 40 lower-case letters, digits and hyphens, a letter first. "
     f"Received: '{'a' * 41}'"),
    ((), {"bucket": "my-bucket"}, "--bucket must be gs://BUCKET or gs://BUCKET/DIR. Received: 'my-bucket'"),
    (("--config.data.path=gs://other/r.jsonl",), {}, "pods see gs://my-bucket alone, that of --bucket. Received: "
     "'--config.data.path=gs://other/r.jsonl'"),
    (("--workdir=gs://my-bucket/x",), {}, "what goes to train must look like --config.KEY=VALUE, and --name says where "
     "the run lives. Received: '--workdir=gs://my-bucket/x'"),
    (("stray",), {}, "what goes to train must look like --config.KEY=VALUE, and --name says where the run lives. "
     "Received: 'stray'"),
    ((), {"image": None}, "the following arguments are required: --image"),
    ((), {"restarts": "x"}, "argument --restarts: invalid int value: 'x'")])
def test_bad_input_is_refused_in_a_line(args, flags, message):
  done = run(*args, "--dry-run", **flags)
  assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}\n")


def test_without_kubectl_it_says_where_it_comes_from(bare_path):
  done = run(env={"PATH": bare_path()})
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == ("error: there is no kubectl here. It comes with the Google Cloud CLI: gcloud components "
                         "install kubectl\n")


def test_without_pyyaml_it_says_what_to_install(tmp_path):
  (tmp_path / "yaml.py").write_text("raise ImportError")
  done = run("--dry-run", env=os.environ | {"PYTHONPATH": str(tmp_path)})
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == "error: there is no PyYAML here: pip install 'virl-jax[launch]'\n"
