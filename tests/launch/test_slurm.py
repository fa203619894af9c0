"""The Slurm script: what it submits, and what it does within a job, with stand-ins for Slurm's commands."""

import contextlib
import os
import pathlib
import signal
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = "launch/slurm.sbatch"
STEP = "srun --kill-on-bad-exit=0 --wait=300 --cpu-bind=none bash launch/until_done.sh --"
OURS = ("SLURM", "SBATCH", "PYTHON", "RESTARTS", "XLA_FLAGS", "JAX_")


def environment(**more: str) -> dict[str, str]:
  return {k: v for k, v in os.environ.items() if not k.startswith(OURS)} | more


def run(*args, cwd=ROOT, **env):
  return subprocess.run(["bash", SCRIPT, *args], cwd=cwd, env=environment(**env), capture_output=True, text=True,
                        timeout=60)


@pytest.mark.parametrize("args", [
    ("--dry-run", "--nodes=4", "--time=1-00:00:00", "configs/v7b.py", "--workdir=/shared/a b", "--config.steps=3"),
    ("--nodes=4", "--time=1-00:00:00", "configs/v7b.py", "--workdir=/shared/a b", "--config.steps=3", "--dry-run")])
def test_dry_run(args):
  done = run(*args)
  assert done.returncode == 0 and not done.stderr
  assert done.stdout.splitlines() == [
      "sbatch --nodes=4 --time=1-00:00:00 launch/slurm.sbatch configs/v7b.py --workdir='/shared/a b' --config.steps=3",
      f"{STEP} python -m virl_jax.train --config=configs/v7b.py --workdir='/shared/a b' --config.steps=3"]


def test_it_submits_itself(stand_in):
  path = stand_in(sbatch='printf "<%s>" "$@"')
  done = run("--nodes=2", "configs/tiny.py", "--workdir=/a b", PATH=f"{path}:{os.environ['PATH']}")
  assert (done.returncode, done.stdout) == (0, "<--nodes=2><launch/slurm.sbatch><configs/tiny.py><--workdir=/a b>")


def test_what_sbatch_reads_of_it():
  head = (ROOT / SCRIPT).read_text().partition("set -euo")[0].splitlines()
  options = {line.removeprefix("#SBATCH ") for line in head if line.startswith("#SBATCH ")}
  # One process a node; back into the queue, with a log that goes on; ten minutes to save, and the script hears of it.
  assert {"--ntasks-per-node=1", "--requeue", "--open-mode=append", "--signal=B:USR1@600"} <= options


@pytest.fixture
def job(tmp_path, stand_in):
  """Starts the script within a job.  `srun` runs its step here, `scancel` signals it, `scontrol` notes its call."""
  path = stand_in(
      srun='while [[ $1 == --* ]]; do shift; done; echo $$ > step; exec "$@"',
      scancel='echo "scancel $*" >> notes; kill -s TERM "$(cat step)"', scontrol='echo "scontrol $*" >> notes',
      python='echo "$VIRL_JAX_DISTRIBUTED $JAX_PLATFORMS $JAX_LOCAL_DEVICE_IDS $XLA_FLAGS $*" >> runs\n'
             'eval "$DO"')
  for name in ("launch", "configs"):
    (tmp_path / name).symlink_to(ROOT / name)

  started = []

  def start(do: str, **env: str) -> subprocess.Popen:
    env = {"SLURM_JOB_ID": "17", "SLURM_GPUS_ON_NODE": "4", "PATH": f"{path}:{os.environ['PATH']}", "DO": do} | env
    started.append(subprocess.Popen(["bash", SCRIPT, "configs/tiny.py", "--workdir=/w"], cwd=tmp_path, text=True,
                                    env=environment(**env), stderr=subprocess.PIPE, start_new_session=True))
    return started[-1]

  yield start
  for process in started:  # what a failed test leaves
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)


def lines(file: pathlib.Path) -> list[str]:
  return file.read_text().splitlines() if file.exists() else []


def until_it_runs(folder: pathlib.Path) -> None:
  end = time.monotonic() + 20
  while not lines(folder / "up"):
    assert time.monotonic() < end
    time.sleep(0.05)


def test_within_a_job_train_gets_the_nodes_gpus_and_ends_it(job, tmp_path):
  process = job("exit 0", XLA_FLAGS="--mine")
  _, err = process.communicate(timeout=30)
  assert process.returncode == 0 and not err
  assert lines(tmp_path / "runs") == [
      "auto cuda,cpu 0,1,2,3 --xla_gpu_enable_latency_hiding_scheduler=true --mine "
      "-m virl_jax.train --config=configs/tiny.py --workdir=/w"]
  assert not lines(tmp_path / "notes")


def test_a_crash_is_tried_again_and_then_given_up(job, tmp_path):
  process = job("exit 9", RESTARTS="2")
  _, err = process.communicate(timeout=30)
  assert process.returncode == 9 and len(lines(tmp_path / "runs")) == 3 and not lines(tmp_path / "notes")
  assert "slurm.sbatch: ended with 9; restart 2 of 2" in err


@pytest.mark.parametrize("code", [0, 1])
def test_near_the_time_limit_it_is_saved_and_queued_again(job, tmp_path, code):
  process = job(f'trap "echo saved >> up; exit {code}" TERM; echo up >> up; while true; do sleep 0.05; done')
  until_it_runs(tmp_path)
  process.send_signal(signal.SIGUSR1)
  process.communicate(timeout=30)
  assert lines(tmp_path / "up") == ["up", "saved"] and len(lines(tmp_path / "runs")) == 1
  assert lines(tmp_path / "notes") == ["scancel --signal=TERM 17", "scontrol requeue 17"]


def test_near_the_time_limit_a_step_that_breaks_is_queued_again(job, tmp_path):
  # If one process ends first, JAX's coordinator may end another: the step's code is then neither 0 nor 75.
  process = job('trap "kill -s KILL $PPID; exit 1" TERM; echo up >> up; while true; do sleep 0.05; done', RESTARTS="0")
  until_it_runs(tmp_path)
  process.send_signal(signal.SIGUSR1)
  process.communicate(timeout=30)
  assert lines(tmp_path / "notes") == ["scancel --signal=TERM 17", "scontrol requeue 17"]


def test_what_was_told_to_stop_is_queued_again(job, tmp_path):
  process = job('trap "echo saved >> up; exit 0" TERM; echo up >> up; while true; do sleep 0.05; done')
  until_it_runs(tmp_path)
  os.kill(int((tmp_path / "step").read_text()), signal.SIGTERM)  # the step alone
  process.communicate(timeout=30)
  assert lines(tmp_path / "up") == ["up", "saved"] and lines(tmp_path / "notes") == ["scontrol requeue 17"]


def test_a_cancelled_job_stays_so(job, tmp_path):
  process = job('trap "echo saved >> up; exit 0" TERM; echo up >> up; while true; do sleep 0.05; done')
  until_it_runs(tmp_path)
  process.send_signal(signal.SIGTERM)  # Slurm tells both
  os.kill(int((tmp_path / "step").read_text()), signal.SIGTERM)
  process.communicate(timeout=30)
  assert process.returncode == 75 and lines(tmp_path / "up") == ["up", "saved"] and not lines(tmp_path / "notes")


@pytest.mark.parametrize("args, env, message", [
    ((), {}, f"There must be a config file, such as configs/tiny.py.  Received: '' (looked from {ROOT})."),
    (("configs/none.py",), {},
     f"There must be a config file, such as configs/tiny.py.  Received: 'configs/none.py' (looked from {ROOT})."),
    (("--nodes", "4", "configs/tiny.py"), {},
     "Options before the config file go to sbatch and must look like --nodes=4.  Received: '--nodes'."),
    (("configs/tiny.py",), {}, "--workdir must be a folder on a disk that all nodes share.  Received: none."),
    (("configs/tiny.py", "--workdir=/w"), {"RESTARTS": "x"}, "RESTARTS must be a whole number.  Received: 'x'.")])
def test_bad_input_is_refused_in_a_line(args, env, message):
  done = run(*args, "--dry-run", **env)
  assert (done.returncode, done.stdout, done.stderr) == (2, "", message + "\n")


def test_elsewhere_it_says_where_to_start_it(tmp_path):
  done = subprocess.run(["bash", ROOT / SCRIPT, "configs/tiny.py"], cwd=tmp_path, capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (
      2, f"Start it in the repository's root, where launch/ is.  This is {tmp_path}.\n")


def test_without_slurm_it_says_where_it_comes_from(bare_path):
  done = run("configs/tiny.py", "--workdir=/w", PATH=bare_path())
  assert (done.returncode, done.stderr) == (
      2, "There is no sbatch here.  It comes with Slurm: start this on a login node.\n")
