"""The command that curates: its arguments and its output, with an endpoint and with several processes."""

import json
import os
import pathlib
import runpy
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.data.curation.test_facts import photo
from tests.data.curation.test_facts import saved
from tests.data.curation.test_funnel import content
from tests.data.curation.test_funnel import lines
from tests.data.curation.test_funnel import make
from tests.data.test_judge_model import Server
from virl_jax import curate
from virl_jax import types
from virl_jax.data import prompt

ROOT = pathlib.Path(__file__).parents[1]


def configuration(**changes):
  c = runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]()
  c.rollout.max_total_tokens, c.rollout.max_turn_tokens, c.curate.shard_tasks = 1024, 64, 4
  c.curate.policy.with_zoom, c.curate.policy.without_zoom = 4, 2
  c.endpoint.wait_s, c.endpoint.timeout_s, c.endpoint.in_flight = 0.01, 0.4, 3
  c.update_from_flattened_dict({"curate.rules.least_box_px": 9.0} | changes)
  return c


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("sets")
  make(folder / "a-train", "a", [{"data": saved(photo(i)), "answers": ("red",)} for i in range(10)])
  make(folder / "b-train", "b", [{"data": saved(photo(i)), "boxes": (types.Box(0, 0, 320, 240),)}
                                 for i in range(20, 24)])
  return str(folder)


def speak(body):
  """Zooms first if it may, and then is right about every other time."""
  said = [m["content"] for m in body["messages"] if m["role"] == "assistant"]
  if not said:
    return prompt.call_text({"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [1, 2, 40, 50]}})
  looked = "Error" not in str(body["messages"][-1]["content"])
  return prompt.answer_text("red" if looked and body["seed"] % 2 else "blue")


def test_an_endpoint_that_fails_changes_no_result(data, tmp_path):
  server = Server(speak)
  try:
    found = []
    for name, faults in (("x/out", []), ("y/out", ["drop", 429, 500, "cut", "slow", "empty", 503])):
      server.faults = list(faults)
      counts = curate.curate(configuration(), data, str(tmp_path / name), server.url)
      found.append(content(tmp_path / name))
      assert counts["read"]["all"] == 14 and counts["after"]["rules"]["all"] == 10 and not server.faults
    assert found[0] == found[1]
    kept = lines(tmp_path / "x" / "out", "tasks")
    assert kept and all(0 < line["pass_with"] < 1 and line["pass_without"] == 0 and line["zooms"] == 1
                        for line in kept)
  finally:
    server.close()


def test_an_endpoint_that_dies_leaves_what_is_finished(data, tmp_path):
  server, out = Server(speak), tmp_path / "out"
  try:
    curate.curate(configuration(), data, str(tmp_path / "whole" / "out"), server.url)
    n_all = len(server.bodies)
    server.bodies.clear()
    server.faults = [None] * (n_all // 2) + [500] * 10 ** 6
    with pytest.raises(curate.remote.endpoint.Unreachable, match="start again when it is back"):
      curate.curate(configuration(**{"endpoint.patience_s": 0.3}), data, str(out), server.url)
    assert not (out / "counts.json").exists() and list((out / ".curate" / "samples").glob("*.jsonl"))
    server.faults = []
    server.bodies.clear()
    curate.curate(configuration(), data, str(out), server.url)
    assert content(out) == content(tmp_path / "whole" / "out") and len(server.bodies) < n_all
  finally:
    server.close()


def test_a_request_that_fails_for_ever_costs_its_task_alone(data, tmp_path):
  server, out = Server(speak), tmp_path / "out"
  endpoint = curate.remote.endpoint
  try:
    curate.curate(configuration(), data, str(tmp_path / "whole" / "out"), server.url)
    n_all, bad = len(server.bodies), lines(tmp_path / "whole" / "out", "tasks")[1]
    seed = curate.remote.seed(curate.remote.seed(configuration().seed, bad["provenance"], "with", 1), 0)
    server.bad_seed = seed
    with pytest.raises(endpoint.Unreachable, match=f"no reply to 1 tasks .{bad['uid']}: 500 [^,]*, . times"):
      curate.curate(configuration(), data, str(out), server.url)
    assert 8 <= sum(body["seed"] == seed for body in server.bodies) < 20
    lost = [line for line in lines(out, "rejects") if line["reason"] == "the endpoint gave no reply"]
    assert [(line["uid"], line["stage"], line["pass_with"]) for line in lost] == [(bad["uid"], "policy", None)]
    assert "the endpoint gave no reply" in (out / "report.html").read_text()
    server.bad_seed = None
    server.bodies.clear()
    curate.curate(configuration(), data, str(out), server.url)
    assert content(out) == content(tmp_path / "whole" / "out")
    assert len(server.bodies) < n_all / 4, "its samples alone"
  finally:
    server.close()


def test_what_it_says(data, tmp_path):
  rules = configuration(**{"curate.policy.with_zoom": 0, "curate.policy.without_zoom": 0})
  counts = curate.curate(rules, data, str(tmp_path / "out"))
  assert curate.told_counts(counts).splitlines() == [
      "14 tasks read", "  4 boxes cover too much", "10 after rules (71.4%)"]


RULES_ALONE = ("--config.curate.policy.with_zoom=0", "--config.curate.policy.without_zoom=0")
# Few and short samples of the tiny base, which knows nothing about photographs; all tasks that could be asked are kept.
ASKED = ("--config.curate.policy.with_zoom=2", "--config.curate.policy.without_zoom=1",
         "--config.curate.filter.least_pass=0.0", "--config.curate.filter.most_without=1.0",
         "--config.curate.filter.most_pass=1.0")
# For a server: room for its longer turns, and no patience with its faults.
SERVED = ("--config.curate.policy.with_zoom=4", "--config.curate.policy.without_zoom=2",
          "--config.rollout.max_total_tokens=1024", "--config.rollout.max_turn_tokens=64",
          "--config.endpoint.wait_s=0.01", "--config.endpoint.in_flight=2")


def command(*more):
  return [sys.executable, "-m", "virl_jax.curate", f"--config={ROOT / 'configs' / 'tiny.py'}",
          "--config.curate.rules.least_box_px=9.0", "--config.curate.shard_tasks=2", *more]


class Run:
  """One command in several processes, each with its own device."""

  def __init__(self, n, *more):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    who = lambda i: (f"--coordinator=127.0.0.1:{port}", f"--num_processes={n}", f"--process_id={i}") if n > 1 else ()
    self.processes = [subprocess.Popen(
        command(*more, *who(i)), cwd=ROOT, env=dict(os.environ, JAX_NUM_CPU_DEVICES="1", PYTHONUNBUFFERED="1"),
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for i in range(n)]

  def end(self):
    """The processes' exit statuses and output, once all have ended."""
    try:
      said = [process.communicate(timeout=300)[0] for process in self.processes]
    finally:
      for process in self.processes:
        process.kill()
    return [process.returncode for process in self.processes], said

  def done(self):
    codes, said = self.end()
    assert not any(codes), said
    return said


def until(found, timeout_s=200):
  """Waits until something is true."""
  ends = time.monotonic() + timeout_s
  while not found():
    assert time.monotonic() < ends
    time.sleep(0.05)


def test_a_slip_is_a_line(data, tmp_path):
  done = subprocess.run(command(f"--data={data}", f"--out={tmp_path / 'out'}", *RULES_ALONE,
                                "--config.curate.rules.caps=('x',)"), cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 1 and 'error: config.curate.rules.caps must be "SOURCE=COUNT"' in done.stderr
  assert "Traceback" not in done.stderr
  with pytest.raises(ValueError, match="a set must be finished"):
    curate.curate(configuration(), "/nowhere", str(tmp_path / "out"))


@pytest.mark.slow
def test_two_processes_leave_what_one_does(data, tmp_path):
  one, two = tmp_path / "one" / "out", tmp_path / "two" / "out"
  Run(1, f"--data={data}", f"--out={one}", *RULES_ALONE).done()
  said = Run(2, f"--data={data}", f"--out={two}", *RULES_ALONE).done()
  assert content(one) == content(two) and all(f"process {i}: facts" in words for i, words in enumerate(said))
  assert json.loads((two / "counts.json").read_text())["kept"]["all"] == 10


@pytest.mark.slow
def test_two_processes_share_an_endpoint_and_one_is_killed(data, tmp_path):
  """Killed, stopped and continued, they leave the same files as one undisturbed process."""
  server = Server(speak)
  try:
    one, two = tmp_path / "one" / "out", tmp_path / "two" / "out"
    Run(1, f"--data={data}", f"--out={one}", f"--endpoint={server.url}", *SERVED).done()
    n_all, samples = len(server.bodies), two / ".curate" / "samples"
    again = lambda: Run(2, f"--data={data}", f"--out={two}", f"--endpoint={server.url}", *SERVED)
    server.bodies.clear()
    server.faults = [None] * (n_all // 3) + [500] * 10 ** 6  # each then waits, and keeps what it has
    run = again()
    until(lambda: len(server.bodies) > n_all // 3 + 20)
    run.processes[1].kill()
    assert all(run.end()[0]) and len(list(samples.glob("*.jsonl"))) < 5
    server.bodies.clear()
    run = again()
    until(lambda: len(server.bodies) > 20)
    run.processes[1].send_signal(signal.SIGTERM)
    codes, said = run.end()
    assert codes == [1, 0] and "stopped by SIGTERM" in said[1] and "Traceback" not in "".join(said)
    assert "process 1 has failed, and so all stop: it was stopped; the same command goes on" in said[0]
    server.faults, n_before = ["drop", 429, "cut", 500], len(server.bodies)
    said = again().done()
    assert content(one) == content(two) and len(server.bodies) > n_before
    assert all(f"process {i}: policy: shard" in words for i, words in enumerate(said))
  finally:
    server.close()


@pytest.mark.slow
def test_two_processes_ask_the_engine_together_and_are_killed(data, tmp_path):
  one, two = tmp_path / "one" / "out", tmp_path / "two" / "out"
  Run(1, f"--data={data}", f"--out={one}", *ASKED).done()
  run = Run(2, f"--data={data}", f"--out={two}", *ASKED)
  until(lambda: len(list((two / ".curate" / "samples").glob("*.jsonl"))) > 1)
  for process in run.processes:
    process.kill()
  run.end()
  assert not (two / "counts.json").exists()
  Run(2, f"--data={data}", f"--out={two}", *ASKED).done()
  assert content(one) == content(two)
  told = [json.loads(line) for path in sorted((one / ".curate" / "samples").glob("*.jsonl"))
          for line in path.read_text().splitlines()[1:]]
  assert len(told) == 10 and len({(s["answer"], s["zooms"], s["stop"]) for it in told for s in it["with"]}) > 3
