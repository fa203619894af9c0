"""The script that runs a command until it is done."""

import pathlib
import signal
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = "launch/until_done.sh"


def run(*args, **kwargs):
  return subprocess.run(["bash", SCRIPT, *args], cwd=ROOT, capture_output=True, text=True, timeout=60, **kwargs)


def start(*args):
  return subprocess.Popen(["bash", SCRIPT, *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def counting(file: pathlib.Path, code: str) -> list[str]:
  """A command that leaves a mark each time it is run."""
  return ["bash", "-c", f'echo x >> "$0"; {code}', str(file)]


def test_what_is_done_is_not_run_again(tmp_path):
  done = run("--restarts=3", "--", *counting(tmp_path / "n", "exit 0"))
  assert (done.returncode, done.stderr, (tmp_path / "n").read_text()) == (0, "", "x\n")


@pytest.mark.parametrize("restarts", [0, 2])
def test_a_crash_is_tried_again_so_often(tmp_path, restarts):
  done = run(f"--restarts={restarts}", "--delay=0", "--", *counting(tmp_path / "n", "exit 7"))
  assert done.returncode == 7 and (tmp_path / "n").read_text() == "x\n" * (restarts + 1)
  assert done.stderr.splitlines()[-1] == f"until_done: ended with 7 after {restarts} restarts of {restarts}; giving up"


def test_a_crash_that_is_over_ends_well(tmp_path):
  done = run("--restarts=3", "--delay=0", "--", *counting(tmp_path / "n", '[[ $(wc -l < "$0") -ge 3 ]]'))
  assert done.returncode == 0 and (tmp_path / "n").read_text() == "x\n" * 3


# A stand-in that saves for half a second, and ends with a code of its own.
_SAVES = 'trap "sleep 0.5; echo saved; exit {}" TERM; echo up; while true; do sleep 0.05; done'


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("code", [0, 1])
def test_told_to_stop_it_lets_the_command_save_and_is_not_done(number, code):
  process = start("--restarts=3", "--", "bash", "-c", _SAVES.format(code))
  assert process.stdout.readline() == "up\n"
  process.send_signal(number)
  time.sleep(0.1)
  process.send_signal(number)  # schedulers send several
  out, err = process.communicate(timeout=30)
  assert process.returncode == 75 and out == "saved\n"
  assert err.count("\n") == 1 and f"the command ended with {code}" in err


def test_told_between_two_attempts_it_stops_at_once(tmp_path):
  process = start("--restarts=3", "--delay=50", "--", *counting(tmp_path / "n", "exit 7"))
  assert "restart 1 of 3 in 50 s" in process.stderr.readline()
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=30)
  assert process.returncode == 75 and (tmp_path / "n").read_text() == "x\n"


def test_dry_run_prints_the_command_and_runs_nothing(tmp_path):
  words = ["touch", str(tmp_path / "x"), "a b", "it's", "", "--x=", "--y=$HOME `x`", "back\\slash"]
  done = run("--dry-run", "--", *words)
  assert done.returncode == 0 and not (tmp_path / "x").exists()
  back = subprocess.run(["bash", "-c", f'printf "<%s>" {done.stdout}'], capture_output=True, text=True, check=True)
  assert back.stdout == "".join(f"<{word}>" for word in words)


@pytest.mark.parametrize("args, message", [
    (("--restarts=many", "--", "true"), "--restarts must be a whole number.  Received: 'many'."),
    (("--delay=-1", "--", "true"), "--delay must be a whole number of seconds.  Received: '-1'."),
    (("--again", "--", "true"), "There is no option '--again'."),
    (("true",), "There is no option 'true'."),
    ((), "After -- there must be a command."), (("--",), "After -- there must be a command.")])
def test_bad_input_is_refused_in_a_line(args, message):
  done = run(*args)
  assert (done.returncode, done.stdout, done.stderr) == (2, "", message + "\n")
