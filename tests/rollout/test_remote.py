"""Rollouts by an endpoint: what it is sent, what its words lead to, and that no fault of a network is an answer."""

import base64
import dataclasses
import io
import json

from PIL import Image
import pytest

from tests.data.test_judge_model import Server
from virl_jax import types
from virl_jax.data import endpoint
from virl_jax.data import images
from virl_jax.data import prompt
from virl_jax.model import weights
from virl_jax.rollout import remote
from virl_jax.rollout import turns
from virl_jax.run import load
from virl_jax.tiny import needle


@pytest.fixture(scope="module")
def policy():
  folder = load.model_dir("@tiny")
  model = weights.read_config(folder)
  return turns.Policy(model, load.codec(folder, model), prompt.Config(), images.Config(max_pixels=84 * 84),
                      turns.Config(2, 64, 2048), None)


@pytest.fixture(scope="module")
def tasks():
  cfg = needle.Config(families=("pattern",))
  return [needle.draw(5, "remote", i, cfg)[0] for i in range(4)]


def speak(body: dict) -> str:
  """A zoom whose box depends on the seed, then an answer that depends on all that was sent before."""
  said = [m["content"] for m in body["messages"] if m["role"] == "assistant"]
  question = str(body["messages"][1]["content"])
  if not said:
    x = body["seed"] % 40
    return prompt.call_text({"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [x, 10, x + 30, 60]}}, "where?")
  return prompt.answer_text(f"{len(said)} {sum(map(ord, question + said[0])) % 1000}")


@pytest.fixture
def server():
  it = Server(speak)
  yield it
  it.close()


def ask(policy, server, tasks, group_size=2, seeds=None, **how):
  said = []
  cfg = endpoint.Config(**{"model": "m", "timeout_s": 0.5, "wait_s": 0.01, "in_flight": 3} | how)
  it = remote.Endpoint(server.url, cfg, said.append)
  seeds = seeds or range(100, 100 + len(tasks) * group_size)
  return remote.rollout(policy, it, tasks, seeds, group_size), it, said


def read(trajectories):
  return [(t.index, t.task.uid, t.answer, t.stop, t.regions, t.ids.tolist()) for t in trajectories]


def test_a_zoom_and_an_answer(policy, server, tasks):
  found, it, said = ask(policy, server, tasks)
  assert [t.index for t in found] == list(range(8)) and it.retries == 0 and not said
  assert all(t.stop == types.StopReason.ANSWERED and len(t.regions) == 1 and len(t.images) == 2 for t in found)
  assert len({t.answer for t in found[:2]}) == 2, "rollouts of a task have seeds of their own"
  one = found[0]
  assert [turn.role for turn in one.turns] == ["assistant", "tool", "assistant"]
  # What was written and read is one token stream, as in the engine.
  words = prompt.render(tasks[0].question, None, policy.prompt, policy.actions)
  assert prompt.readable(policy.codec.decode(one.ids)) == words + "".join(turn.text for turn in one.turns)


def test_what_is_sent(policy, server, tasks):
  found, *_ = ask(policy, server, tasks[:1], 1)
  first, second = server.bodies
  assert first["model"] == "m" and first["temperature"] == 1.0 and first["max_tokens"] == 64
  assert first["seed"] != second["seed"], "turns have seeds of their own"
  system, user = first["messages"]
  assert system["role"] == "system" and "image_zoom_in_tool" in system["content"]
  assert [part["type"] for part in user["content"]] == ["image_url", "text"]
  assert user["content"][1]["text"] == tasks[0].question
  assert [m["role"] for m in second["messages"]] == ["system", "user", "assistant", "user"]
  assert second["messages"][2]["content"] == found[0].turns[0].text.removesuffix(prompt.END)
  before, crop, after = second["messages"][3]["content"]
  assert (before["text"], after["text"]) == ("<tool_response>\n", "\n</tool_response>")
  for part, shown in ((user["content"][0], found[0].images[0]), (crop, found[0].images[1])):
    picture = Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2])))
    grid = policy.model.vision.grid
    again = images.prepare(picture.convert("RGB"), None, 784, 10 ** 7, grid)
    assert again.grid_hw == shown.grid_hw and (again.patches_PC == shown.patches_PC).all(), "the pixels as shown"


def test_messages_are_the_chat_template_s_own(policy):
  words = (prompt.render("what?", ("a", "b"), policy.prompt, policy.actions) + "<tool_call>\nx\n</tool_call>"
           + prompt.END + prompt.tool_turn(notice="Answer now."))
  for first in (True, False):
    cfg = dataclasses.replace(policy.prompt, image_first=first)
    words = prompt.render("what?", ("a", "b"), cfg, policy.actions) + "said" + prompt.END + prompt.tool_turn()
    chat = remote.messages(words, ["data:1", "data:2"])
    for message in chat:
      if not isinstance(message["content"], str):
        message["content"] = [{"type": "image"} if part["type"] == "image_url" else part
                              for part in message["content"]]
    assert policy.codec.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == words


FAULTS = ["drop", 429, 500, "cut", "empty", 503, "slow", "drop", "cut", 429]


@pytest.mark.parametrize("faults", [FAULTS, FAULTS[::-1], [None, None, *FAULTS]], ids=["first", "reversed", "later"])
def test_faults_change_no_result(policy, server, tasks, faults):
  want = read(ask(policy, server, tasks)[0])
  server.faults = list(faults)
  found, it, _ = ask(policy, server, tasks, timeout_s=0.4)
  assert read(found) == want and it.retries == len([f for f in faults if f])


def test_a_dead_endpoint_is_waited_for_and_then_an_error(policy, server, tasks):
  server.faults = [500] * 10 ** 5
  with pytest.raises(endpoint.Unreachable, match="has given no reply for .*500.*Nothing was counted as wrong"):
    ask(policy, server, tasks, patience_s=0.3)
  server.faults = [500] * 20
  found, it, said = ask(policy, server, tasks)
  assert len(found) == 8 and it.retries == 20 and len(said) == 1 and "gives no reply (500 busy): waiting" in said[0]


class Choosy(Server):
  """Fails at every request about one picture, as long as `broken` holds it."""

  def __init__(self, picture):
    self.broken = picture

    def said(body):
      if self.broken and self.broken in str(body["messages"][1]["content"]):
        return {"content": None}, "stop"  # a reply without text, as bad as none
      return speak(body)

    super().__init__(said)


def _sent(policy, task):
  """The picture of a task, as it is sent."""
  row = turns.begin(policy, task).row(0)
  return remote._uri(remote.picture(row.picture, row.traj.images[0], policy.model.vision.grid))


@pytest.mark.parametrize("place", [0, 3], ids=["first", "last"])
@pytest.mark.parametrize("in_flight", [1, 3])
def test_a_request_that_alone_fails_is_put_aside(policy, tasks, place, in_flight):
  """Also if it is the only request, and long before the endpoint would count as gone."""
  server = Choosy(_sent(policy, tasks[place]))
  cfg = endpoint.Config("m", timeout_s=5.0, wait_s=0.01, patience_s=600.0, tries=4, in_flight=in_flight)
  it = remote.Endpoint(server.url, cfg)
  try:
    if in_flight == 1 and place == 0:  # it has not replied to any request yet, and may as well be gone
      remote.attempts(policy, it, tasks[1:2], [101], 1.0)
    found = remote.attempts(policy, it, tasks, range(100, 104), 1.0)
    assert [isinstance(one, str) for one in found] == [i == place for i in range(4)]
    assert found[place].startswith("a reply without text, ") and "while other requests had a reply" in found[place]
    asked = sum(server.broken in str(body["messages"][1]["content"]) for body in server.bodies)
    assert 4 <= asked <= 8, "a bounded number of tries"
    with pytest.raises(endpoint.PutAside, match="4 times, while other requests had a reply"):
      remote.rollout(policy, it, tasks[place:place + 1], [100 + place], 1)
    server.broken = None
    assert isinstance(remote.attempts(policy, it, tasks[place:place + 1], [100 + place], 1.0)[0], types.Trajectory)
  finally:
    server.close()


@pytest.mark.parametrize("n", [12, 13])
def test_an_endpoint_that_is_busy_or_dead_puts_nothing_aside(policy, server, tasks, n):
  """503 says nothing about a request, and if no request gets a reply, it is the endpoint that fails."""
  cfg = endpoint.Config("m", timeout_s=5.0, wait_s=0.001, patience_s=60.0, tries=2, in_flight=1)
  it = remote.Endpoint(server.url, cfg)
  remote.attempts(policy, it, tasks[:1], [7], 1.0)
  server.faults = [503] * 6
  assert isinstance(remote.attempts(policy, it, tasks[:1], [7], 1.0)[0], types.Trajectory)
  server.faults, it.retries = [500] * n, 0
  assert isinstance(remote.attempts(policy, it, tasks[:1], [7], 1.0)[0], types.Trajectory)
  assert not server.faults and 0 < it.retries < n, "the others were probes"


def attempt(policy, server, tasks, **how):
  cfg = endpoint.Config(**{"model": "m", "timeout_s": 0.5, "wait_s": 0.01, "in_flight": 1} | how)
  return remote.attempts(policy, remote.Endpoint(server.url, cfg), tasks, range(100, 100 + len(tasks)), 1.0)


def test_an_attempt_that_fails_costs_no_other(policy, server, tasks):
  want = read(ask(policy, server, tasks, 1, range(100, 104))[0])
  server.faults = [400, 500]
  first, *rest = attempt(policy, server, tasks)
  assert first.startswith("400 from http://") and read(rest) == want[1:]


def test_an_endpoint_that_is_gone_is_tried_once_for_each(policy, server, tasks):
  server.faults = [503] * 10 ** 5
  assert attempt(policy, server, tasks, wait_s=0.1, patience_s=0.25) == ["503 busy"] * 4
  assert len(server.bodies) <= 3 + 3, "the first is tried at 0, 0.1 and 0.3 s"


def test_an_endpoint_that_is_back_is_waited_for_again(policy, server, tasks):
  it = remote.Endpoint(server.url, endpoint.Config("m", timeout_s=5.0, wait_s=0.01, patience_s=0.5, in_flight=1))
  whole = lambda: isinstance(remote.attempts(policy, it, tasks[:1], [7], 1.0)[0], types.Trajectory)
  server.faults = [503] * 10 ** 5
  assert not whole()
  server.faults = []
  assert whole()
  server.faults = [503, 503]
  assert whole()


def test_a_refusal_is_not_tried_again(policy, server, tasks):
  server.faults = [404]
  with pytest.raises(ValueError, match="--endpoint must take chat completions.*'m'.*404"):
    ask(policy, server, tasks[:1], 1)
  assert len(server.bodies) == 1
  with pytest.raises(ValueError, match="--endpoint must be an address.*localhost"):
    remote.Endpoint("localhost:8000", endpoint.Config())


@pytest.mark.parametrize("words, stop, n_turns", [
    (("<answer>red</answer>", "length"), types.StopReason.OVERLONG, 1),
    ("nothing", types.StopReason.MALFORMED, 1),
    ("", types.StopReason.MALFORMED, 1),
    ("<answer>red</answer><|im_end|>", types.StopReason.ANSWERED, 1),
    ("x" * 5000, types.StopReason.OVERLONG, 1),
    ("<tool_call>{}</tool_call>", types.StopReason.OUT_OF_ROUNDS, 5),
    ("<|image_pad|><|im_start|><answer>red</answer>", types.StopReason.ANSWERED, 1)])
def test_every_word_is_read_by_our_rules(policy, tasks, words, stop, n_turns):
  server = Server(lambda body: words)
  try:
    (one,), *_ = ask(policy, server, tasks[:1], 1)
  finally:
    server.close()
  assert (one.stop, len(one.turns)) == (stop, n_turns)
  assert (one.ids == policy.model.image_token).sum() == 9, "no picture but the one that was shown"


@pytest.mark.parametrize("arguments", ['{"bbox_2d":[1,  2, 40, 50]}', {"bbox_2d": [1, 2, 40, 50]}, '{"bbox_2d": [1,'])
def test_thoughts_and_calls_that_a_server_takes_out_are_put_back(policy, tasks, arguments):
  call = {"id": "1", "type": "function", "function": {"name": "image_zoom_in_tool", "arguments": arguments}}
  first = ({"content": None, "tool_calls": [call], "reasoning_content": "where?"}, "tool_calls")
  server = Server(lambda body: prompt.answer_text("red") if len(body["messages"]) > 2 else first)
  try:
    (one,), *_ = ask(policy, server, tasks[:1], 1)
  finally:
    server.close()
  assert one.answer == "red"
  if arguments == '{"bbox_2d": [1,':
    assert one.turns[0].error == "the tool call is not valid JSON" and not one.regions
  else:
    want = prompt.call_text({"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [1, 2, 40, 50]}}, "where?")
    assert one.turns[0].text == want + prompt.END and len(one.regions) == 1


def test_stop_strings_end_a_turn_here(policy, tasks):
  server = Server(lambda body: "<answer>red</answer> and so on, and on")
  stops = dataclasses.replace(policy, rollout=dataclasses.replace(policy.rollout, stop_strings=("</answer>",)))
  try:
    (one,), *_ = ask(stops, server, tasks[:1], 1)
  finally:
    server.close()
  assert one.answer == "red" and one.turns[0].text == "<answer>red</answer>" and "stop" not in server.bodies[0]


def test_without_zooms(policy, server, tasks):
  found, *_ = ask(turns.without_actions(policy), server, tasks[:1], 1)
  assert "image_zoom" not in json.dumps(server.bodies[0]["messages"][0])
  assert not found[0].regions and found[0].refused == 1 and found[0].stop == types.StopReason.ANSWERED
