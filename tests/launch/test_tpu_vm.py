"""The launcher for Cloud TPU VMs: what it would run, and what that does on a host made of stand-ins."""

import os
import pathlib
import shlex
import shutil
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
POD = ("--name=pod", "--zone=us-west4-a")
BUCKET = "--workdir=gs://my-bucket/runs/v7b"
FREE = ('mkdir -p virl_jax_run && { flock --nonblock virl_jax_run/lock true '
        '|| { echo "$(hostname) is running; stop it first" >&2; exit 3; }; }')
SSH = "gcloud compute tpus tpu-vm ssh pod --zone=us-west4-a --worker=all"


def run(*args, cwd=ROOT, **env):
  return subprocess.run(["bash", ROOT / "launch" / "tpu_vm.sh", *args], cwd=cwd, env=os.environ | env,
                        capture_output=True, text=True, timeout=60)


def dry(*args) -> list[str]:
  done = run(*args, "--dry-run")
  assert done.returncode == 0 and not done.stderr, done.stderr
  return done.stdout.splitlines()


def remote(line: str) -> str:
  """The shell command line that a gcloud command runs on the hosts."""
  return next(w for w in shlex.split(line) if w.startswith("--command=")).removeprefix("--command=")


@pytest.mark.parametrize("topology, expected", [
    ("v4:2x2x4", "--accelerator-type=v4-32 --version=tpu-ubuntu2204-base"),
    ("v5e:8x8", "--accelerator-type=v5litepod-64 --version=v2-alpha-tpuv5-lite"),
    ("v5p:2x2x4", "--accelerator-type=v5p-32 --version=v2-alpha-tpuv5"),
    ("v6e:4x4", "--accelerator-type=v6e-16 --version=v2-alpha-tpuv6e")])
def test_create(topology, expected):
  assert dry("create", *POD, f"--topology={topology}") == [
      f"gcloud compute tpus tpu-vm create pod --zone=us-west4-a {expected}"]


def test_create_spot_of_a_project_with_flags_of_ones_own():
  assert dry("create", *POD, "--project=me", "--topology=v6e:4x4", "--spot", "--version=other", "--", "--labels=a=b",
             "--description=a b") == [
      "gcloud compute tpus tpu-vm create pod --zone=us-west4-a --project=me --accelerator-type=v6e-16 --spot "
      "--version=other --labels=a=b --description='a b'"]


def test_create_queued():
  assert dry("create", *POD, "--topology=v5e:8x8", "--queued", "--spot") == [
      "gcloud compute tpus queued-resources create pod --node-id=pod --zone=us-west4-a "
      "--accelerator-type=v5litepod-64 --spot --runtime-version=v2-alpha-tpuv5-lite"]


def test_install_copies_what_is_committed():
  lines = dry("install", *POD)
  archive = f"{os.environ.get('TMPDIR', '/tmp')}/virl_jax-pod.tar.gz"
  assert lines[:3] == [
      f"git archive --format=tar.gz --output={archive} HEAD",
      f"gcloud compute tpus tpu-vm scp {archive} pod:virl_jax.tar.gz --zone=us-west4-a --worker=all",
      f"{SSH} --command='{FREE} && rm -rf virl_jax && mkdir virl_jax && tar -xzf virl_jax.tar.gz -C virl_jax'"]
  assert all(line.startswith(SSH) for line in lines[3:]) and len(lines) == 5
  assert "pip install --quiet --python=.venv/bin/python '.[tpu,gcs]'" in remote(lines[3])
  assert remote(lines[4]).startswith("command -v gcsfuse || {")


def test_install_clones():
  lines = dry("install", *POD, "--repo=https://host/a b.git", "--ref=v1")
  assert remote(lines[0]) == (f"{FREE} && rm -rf virl_jax && git clone --quiet 'https://host/a b.git' virl_jax "
                              "&& git -C virl_jax checkout --quiet v1")
  assert len(lines) == 3


def test_run_mounts_each_bucket_of_data_once_and_passes_the_rest_on():
  [line] = dry("run", *POD, "--restarts=2", "configs/v7b.py", BUCKET, "--config.data.path=gs://my-bucket/r.jsonl",
               "--config.model.path=gs://weights/7b", "--config.monitor.stop=('a', 'b')")
  assert line.startswith(SSH)
  told = remote(line)
  assert told.count(" my-bucket /mnt/gcs/my-bucket; }; }") == told.count(" weights /mnt/gcs/weights; }; }") == 1
  assert ("JAX_PLATFORMS=tpu,cpu VIRL_JAX_DISTRIBUTED=auto nohup flock --nonblock --no-fork ../virl_jax_run/lock "
          "bash launch/until_done.sh --restarts=2 -- .venv/bin/python -m virl_jax.train --config=configs/v7b.py "
          "--workdir=gs://my-bucket/runs/v7b --config.data.path=/mnt/gcs/my-bucket/r.jsonl "
          "--config.model.path=/mnt/gcs/weights/7b --config.monitor.stop='('\\''a'\\'', '\\''b'\\'')' ") in told


@pytest.mark.parametrize("workdir", ["/nfs/v7b", "gs://my-bucket/runs/v7b"])
def test_run_mounts_nothing_for_the_workdir(workdir):
  [line] = dry("run", *POD, "configs/v7b.py", f"--workdir={workdir}")
  assert "gcsfuse" not in line and f"--workdir={workdir}" in line


def test_status_stop_collect_delete():
  describe = "describe pod --zone=us-west4-a --format="
  assert [line.partition(" --command=")[0] for line in dry("status", *POD, "--queued")] == [
      f"gcloud compute tpus queued-resources {describe}'value(state.state)'",
      f"gcloud compute tpus tpu-vm {describe}'value(state,health)'", SSH]
  assert len(dry("status", *POD)) == 2
  assert [line.partition(" --command=")[0] for line in dry("stop", *POD)] == [SSH]
  assert dry("collect", *POD, BUCKET, "--to=a b") == [
      "mkdir -p 'a b'", "gcloud storage rsync --recursive gs://my-bucket/runs/v7b 'a b'"]
  assert dry("collect", *POD, "--workdir=/nfs/v7b", "--to=here") == [
      "gcloud compute tpus tpu-vm scp pod:/nfs/v7b here --zone=us-west4-a --worker=0 --recurse"]
  assert dry("delete", *POD) == ["gcloud compute tpus tpu-vm delete pod --zone=us-west4-a"]
  assert dry("delete", *POD, "--queued") == [
      "gcloud compute tpus queued-resources delete pod --zone=us-west4-a --force"]


@pytest.mark.parametrize("args, message", [
    ((), "The first argument must be one of: create install run status stop collect delete.  Received: ''."),
    (("start", *POD), "The first argument must be one of: create install run status stop collect delete.  "
     "Received: 'start'."),
    (("create", "--name=Pod", "--zone=z"), "--name must be lower-case letters, digits and hyphens, a letter first.  "
     "Received: 'Pod'."),
    (("create", "--name=pod"), "--zone must be a zone that has TPUs, such as us-west4-a.  Received: ''."),
    (("create", *POD), "--topology must be v4, v5e, v5p or v6e, a colon and the slice, such as v5e:8x8 or v5p:2x2x4.  "
     "Received: ''."),
    *((("create", *POD, f"--topology={t}"), "--topology must be v4, v5e, v5p or v6e, a colon and the slice, such as "
       f"v5e:8x8 or v5p:2x2x4.  Received: '{t}'.") for t in ("h100:8", "v5e", "v5e:64", "v5e:0x8", "v9:2x2")),
    (("create", *POD, "--topolgy=v5e:8x8"), "'create' has no option '--topolgy=v5e:8x8'."),
    (("status", *POD, "--spot"), "'status' has no option '--spot'."),
    (("run", *POD), "run must be given a config file, such as configs/tiny.py."),
    (("run", *POD, "--workdir=gs://b/x", "configs/tiny.py"),
     "'run' has no option '--workdir=gs://b/x'; what goes to train follows the config file."),
    (("run", *POD, "--restarts=x", "configs/tiny.py", BUCKET), "--restarts must be a whole number.  Received: 'x'."),
    (("run", *POD, "configs/tiny.py"),
     "--workdir= must be what all hosts see: gs://BUCKET/DIR, or an absolute path on a disk that they share."),
    (("run", *POD, "configs/tiny.py", "--workdir=runs/x"),
     "--workdir= must be what all hosts see: gs://BUCKET/DIR, or an absolute path on a disk that they share."),
    (("run", *POD, "configs/tiny.py", "--workdir=gs://bucket"),
     "--workdir= must be what all hosts see: gs://BUCKET/DIR, or an absolute path on a disk that they share."),
    (("run", *POD, "configs/tiny.py", "--workdir=gs://"),
     "A bucket's address must look like gs://BUCKET/DIR.  Received: '--workdir=gs://'."),
    (("collect", *POD, "--to=x"), "--workdir must be what run was given.  Received: ''."),
    (("collect", *POD, BUCKET), "--to must be a folder here.  Received: ''.")])
def test_bad_input_is_refused_in_a_line(args, message):
  done = run(*args, "--dry-run")
  assert (done.returncode, done.stdout, done.stderr) == (2, "", message + "\n")


def test_a_config_that_the_hosts_would_not_have_is_refused(tmp_path):
  (tmp_path / "mine.py").touch()
  for config in ("configs/none.py", str(tmp_path / "mine.py")):
    done = run("run", *POD, config, BUCKET, "--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("The config file must lie in the repository, as the hosts have that alone.  Received: "
                           f"'{config}' (in {ROOT}).\n")


def test_without_gcloud_it_says_where_it_comes_from(bare_path):
  done = run("delete", *POD, PATH=bare_path())
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == ("There is no gcloud here.  It comes with the Google Cloud CLI: "
                         "https://cloud.google.com/sdk/docs/install\n")


@pytest.fixture
def host(tmp_path, stand_in):
  """A TPU VM with a stand-in for `python`; the stand-in for gcloud runs commands there.  Gives (home, environment)."""
  home = tmp_path / "home"
  (home / "virl_jax" / ".venv" / "bin").mkdir(parents=True)
  shutil.copytree(ROOT / "launch", home / "virl_jax" / "launch")
  path = stand_in(
      gcloud='cd "$HOME"; for word in "$@"; do [[ $word != --command=* ]] || exec bash -c "${word#--command=}"; done',
      sudo='echo "sudo $*" >> "$HOME/calls"', gcsfuse='echo "gcsfuse $*" >> "$HOME/calls"', mountpoint="exit 1",
      chown="true")
  python = home / "virl_jax" / ".venv" / "bin" / "python"
  python.write_text('#!/usr/bin/env bash\ntrap "echo saved; exit 0" TERM\n'
                    'echo "$JAX_PLATFORMS $VIRL_JAX_DISTRIBUTED $*"\nwhile true; do sleep 0.05; done\n')
  python.chmod(0o755)
  return home, {"HOME": str(home), "PATH": f"{path}:{os.environ['PATH']}", "USER": "me"}


def _until(condition, seconds=20):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.05)


def test_on_a_host_a_run_starts_once_and_stops_when_told(host):
  home, env = host
  log = home / "virl_jax_run" / "log"
  data = "--config.data.path=gs://my-bucket/r.jsonl"
  begun = run("run", *POD, "configs/tiny.py", BUCKET, data, **env)
  assert begun.returncode == 0, begun.stderr
  try:
    _until(lambda: log.exists() and log.read_text())
    assert log.read_text() == ("tpu,cpu auto -m virl_jax.train --config=configs/tiny.py "
                               "--workdir=gs://my-bucket/runs/v7b --config.data.path=/mnt/gcs/my-bucket/r.jsonl\n")
    calls = (home / "calls").read_text().splitlines()
    assert calls[0] == "sudo mkdir -p /mnt/gcs/my-bucket" and calls[-1].endswith(" my-bucket /mnt/gcs/my-bucket")
    assert ": running\n" in run("status", *POD, **env).stdout

    again = run("run", *POD, "configs/tiny.py", BUCKET, **env)
    assert again.returncode == 3 and again.stderr.endswith(" is running; stop it first\n")
    assert run("install", *POD, "--repo=https://host/x.git", **env).returncode == 3  # which would delete it
    assert log.read_text().count("\n") == 1
  finally:
    stopped = run("stop", *POD, **env)
  assert stopped.returncode == 0, stopped.stderr
  _until(lambda: "until_done: SIGTERM came, and the command ended with 0" in log.read_text())
  assert "saved\n" in log.read_text()
  _until(lambda: ": not running\n" in run("status", *POD, **env).stdout)
  assert "nothing runs on" in run("stop", *POD, **env).stdout
