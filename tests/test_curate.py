"""The command that curates: what it is given, what it says, with an endpoint and with several processes."""

import json
import pathlib
import runpy
import socket
import subprocess
import sys

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
  """Looks first where it may, and then is right about every other time."""
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


def test_what_it_says(data, tmp_path):
  rules = configuration(**{"curate.policy.with_zoom": 0, "curate.policy.without_zoom": 0})
  counts = curate.curate(rules, data, str(tmp_path / "out"))
  assert curate.told_counts(counts).splitlines() == [
      "14 tasks read", "  4 boxes cover too much", "10 after rules (71.4%)"]


def command(*more):
  return [sys.executable, "-m", "virl_jax.curate", f"--config={ROOT / 'configs' / 'tiny.py'}",
          "--config.curate.policy.with_zoom=0", "--config.curate.policy.without_zoom=0",
          "--config.curate.rules.least_box_px=9.0", "--config.curate.shard_tasks=2", *more]


def test_a_slip_is_a_line(data, tmp_path):
  done = subprocess.run(command(f"--data={data}", f"--out={tmp_path / 'out'}", "--config.curate.rules.caps=('x',)"),
                        cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 1 and 'error: config.curate.rules.caps must be "SOURCE=COUNT"' in done.stderr
  assert "Traceback" not in done.stderr
  with pytest.raises(ValueError, match="data.path must be a finished set"):
    curate.curate(configuration(), "/nowhere", str(tmp_path / "out"))


@pytest.mark.slow
def test_two_processes_leave_what_one_does(data, tmp_path):
  one, two = tmp_path / "one" / "out", tmp_path / "two" / "out"
  subprocess.run(command(f"--data={data}", f"--out={one}"), cwd=ROOT, check=True)
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  runs = [subprocess.Popen(command(f"--data={data}", f"--out={two}", f"--coordinator=127.0.0.1:{port}",
                                   "--num_processes=2", f"--process_id={i}"), cwd=ROOT, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for i in range(2)]
  said = [run.communicate(timeout=300)[0] for run in runs]
  assert [run.returncode for run in runs] == [0, 0], said
  assert content(one) == content(two) and all(f"process {i}: facts" in words for i, words in enumerate(said))
  assert json.loads((two / "counts.json").read_text())["kept"]["all"] == 10
