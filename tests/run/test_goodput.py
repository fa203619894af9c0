"""Where a run's time went, worked out by hand for a run with a kill, steps that are done again, and a pause."""

import json

import pytest

from virl_jax.run import goodput

# (at, spent, further keys): two starts, between which steps 2 and 3 are lost and a minute passes.
HISTORY = [
    (0, "stopped", {}), (10, "startup", {}), (14, "evaluation", {}), (15, "startup", {"resumed": 0}),
    (25, "step", {"step": 0, "compile_s": 6.0, "checkpoint_s": 0.0}),   # 4 useful
    (28, "step", {"step": 1, "compile_s": 0.0, "checkpoint_s": 1.0}),   # 2 useful
    (31, "step", {"step": 2, "compile_s": 0.0, "checkpoint_s": 0.0}),   # 3 in vain
    (34, "step", {"step": 3, "compile_s": 1.0, "checkpoint_s": 0.0}),   # 2 in vain
    (100, "stopped", {}), (105, "startup", {}), (105, "evaluation", {}), (107, "startup", {"resumed": 2}),
    (115, "step", {"step": 2, "compile_s": 5.0, "checkpoint_s": 0.0}),  # 3 useful
    (118, "step", {"step": 3, "compile_s": 0.0, "checkpoint_s": 0.0}),  # 3 useful
    (121, "checkpoint", {}), (125, "evaluation", {})]
EVENTS = [{"at": float(at), "spent": spent, **more} for at, spent, more in HISTORY]
PARTS = {"useful": 12.0, "redone": 5.0, "compile": 12.0, "checkpoint": 4.0, "evaluation": 8.0, "startup": 18.0,
         "stopped": 66.0}


def test_by_hand():
  assert goodput.split(EVENTS) == PARTS and sum(PARTS.values()) == 125.0
  assert goodput.share(PARTS) == 12 / 125
  assert goodput.said(PARTS) == ("goodput 10 % of 2m05s; the rest: between starts 1m06s, starting up 18s, compiling in "
                                 "steps 12s, evaluation 8s, steps done again 5s, checkpoints 4s")


def test_before_the_second_start_nothing_is_lost():
  found = goodput.split(EVENTS[:8])
  assert found["useful"] == 11.0 and found["redone"] == found["stopped"] == 0.0
  began = goodput.split(EVENTS[:9])  # before the second start knows its first step
  assert began["useful"] == 11.0 and began["stopped"] == 66.0
  assert goodput.split(EVENTS[:12])["redone"] == 5.0, "lost, though not yet done again"


def test_a_run_set_back_to_its_start_has_nothing_to_show():
  found = goodput.split([*EVENTS, {"at": 130.0, "spent": "stopped"}, {"at": 131.0, "spent": "startup", "resumed": 0}])
  assert found["useful"] == 0.0 and found["redone"] == 17.0 and found["compile"] == 12.0


def test_nothing_and_little():
  none = dict.fromkeys(goodput.PARTS, 0.0)
  assert goodput.split([]) == goodput.split(EVENTS[:1]) == none
  assert goodput.share(none) == 0.0 and goodput.said(none) == "goodput 0 % of 0s"
  assert goodput.said(none | {"useful": 1000.0, "startup": 4.0}) == "goodput 100 % of 16m44s", "what is not to be seen"


def test_more_compiling_than_time_passed():
  """Threads compile at the same time; a clock that is set back subtracts no time."""
  found = goodput.split([EVENTS[0], {"at": 9.0, "spent": "step", "step": 0, "compile_s": 20.0, "checkpoint_s": 2.0},
                         {"at": 8.0, "spent": "evaluation"}])
  assert found["compile"] == 7.0 and found["checkpoint"] == 2.0 and sum(found.values()) == 9.0


def write(path, history):
  """Writes a history to a file by clocks, one for each start; returns the last clock."""
  times = iter([at for at, spent, _ in history if spent != "stopped"])
  for at, spent, more in history:
    if spent == "stopped":
      clock = goodput.Clock(path, at, lambda: next(times))
    else:
      clock.lap(spent, **more)
    yield clock


def test_the_file(tmp_path):
  path = str(tmp_path / "wallclock.jsonl")
  for number, clock in enumerate(write(path, HISTORY), start=1):
    assert clock.parts == pytest.approx(goodput.split(EVENTS[:number])), "as it goes along"
    assert goodput.read(path) == EVENTS[:number], "on the disk at once"
  assert list(goodput.PARTS) == list(clock.parts)


@pytest.mark.parametrize("rest", [b'{"at": 34.5, "spe', b'{"at": 3', b'{"at": NaN', b"\0\0\0\0", b"\xff\n\n[]\n7\n"])
def test_what_a_power_cut_leaves_is_passed_over(tmp_path, rest):
  path = tmp_path / "wallclock.jsonl"
  list(write(str(path), HISTORY[:8]))
  path.write_bytes(path.read_bytes() + rest)
  assert goodput.read(str(path)) == EVENTS[:8]
  assert [*write(str(path), HISTORY[8:])][-1].parts == pytest.approx(PARTS)
  assert goodput.read(str(path)) == EVENTS


@pytest.mark.parametrize("line", [
    {"at": "1", "spent": "step", "step": 1}, {"at": 1.0, "spent": "lunch"}, {"at": 1.0, "spent": "step"},
    {"at": 1.0, "spent": "step", "step": 1, "compile_s": "<b>"}, {"at": True, "spent": "startup"},
    {"spent": "startup"}])
def test_lines_that_are_none(tmp_path, line):
  path = tmp_path / "wallclock.jsonl"
  path.write_text(json.dumps(line) + "\n")
  assert goodput.read(str(path)) == []


def test_a_clock_that_is_set_back_and_one_without_a_file(tmp_path):
  path = tmp_path / "wallclock.jsonl"
  times = iter([20.0, 5.0, 8.0])
  clock = goodput.Clock(str(path), 10.0, lambda: next(times))
  clock.lap("startup")
  clock.lap("evaluation")
  goodput.Clock(str(path), 3.0)
  assert [event["at"] for event in goodput.read(str(path))] == [10.0, 20.0, 20.0, 20.0]
  alone = goodput.Clock(None, 1.0, lambda: 4.0)
  alone.lap("step", step=7, compile_s=1.0, checkpoint_s=0.0)
  assert alone.parts["useful"] == 2.0 and [p.name for p in tmp_path.iterdir()] == ["wallclock.jsonl"]
  assert goodput.read(str(tmp_path / "none")) == []
