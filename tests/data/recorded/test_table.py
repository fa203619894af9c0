"""Files of recorded conversations become scripts; records that can't are counted by reason."""

import base64
import io
import json

from PIL import Image
import pytest

from virl_jax import types
from virl_jax.data.recorded import script
from virl_jax.data.recorded import table


@pytest.fixture
def folder(tmp_path):
  Image.new("RGB", (200, 100), "grey").save(tmp_path / "a.png")
  return tmp_path


def write(path, records, lines=False):
  path.write_text("".join(json.dumps(r) + "\n" for r in records) if lines else json.dumps(records))
  return str(path)


def read(path, **choice):
  return table.read([path], table.Choice(**choice))


def only(path, **choice):
  """The only script in a file."""
  found = read(path, **choice)
  assert not found.left_out and not found.not_chosen
  (it,) = found.scripts.values()
  return it


def mini_o3(*turns, images=("a.png",)):
  names = ("human", "gpt")
  return {"images": list(images), "conversations": [{"from": "system", "value": "Use <grounding>."}] + [
      {"from": names[i % 2], "value": turn} for i, turn in enumerate(turns)]}


LOOK = '<think>Closer.</think>\n<grounding>{"bbox_2d": [0.1, 0.2, 0.3, 0.4], "source": "original_image"}</grounding>'
AGAIN = "<think>And closer</think><grounding>{bbox_2d: [0, .5, 1.0, 1], source: observation_1}</grounding>"
SHOWN = "After the above Action 0, here is the zoom-in image (Observation 1):\n<image>."
SAID = "<think>It is orange.</think><answer> Orange </answer>"


def test_mini_o3(folder):
  found = only(write(folder / "cold.json", [mini_o3("<image>\nWhich colour?", LOOK, SHOWN, AGAIN, SHOWN, SAID)]))
  assert found.task == types.Task("cold.json:1", str(folder / "a.png"), "Which colour?", ("Orange",), kind="recorded")
  assert found.said == (script.Look("Closer.", (0.1, 0.2, 0.3, 0.4), "share"),
                        script.Look("And closer", (0, 0.5, 1, 1), "share", 1), script.Answer("It is orange.", "Orange"))
  # An answer without a tag is what follows the thought.
  assert only(write(folder / "bare.json", [mini_o3("<image>Which?", "<think>Easy.</think>\nRed.")])).said == (
      script.Answer("Easy.", "Red."),)


@pytest.mark.parametrize("record, reason, detail", [
    (mini_o3("<image>Q", LOOK.replace("original_image", "picture_2"), SHOWN, SAID),
     "its box names an unknown image", "picture_2"),
    (mini_o3("<image>Q", LOOK.replace("[0.1, 0.2, 0.3, 0.4]", "[0.1, 0.2]"), SHOWN, SAID),
     "its box is not four numbers", '{"bbox_2d": [0.1, 0.2], "source": "original_image"}'),
    (mini_o3("<image>Q", LOOK + LOOK, SHOWN, SAID), "several calls in a turn", None),
    (mini_o3("<image>Q", "Hm.", "Go on.", SAID), "a turn neither calls nor answers", "Hm."),
    (mini_o3("<image>Q", LOOK, "Error: no such image.", SAID), "a call showed nothing", "Error: no such image."),
    (mini_o3("<image>Q", LOOK), "it ends without an answer", ""),
    (mini_o3("<image>Q", SAID + SAID), "several answers in a turn", ""),
    (mini_o3("<image>Q", "<think>What?</think> "), "no answer", ""),
    (mini_o3("<image>Q", SAID, images=["b.png"]), "no image file", "b.png"),
    (mini_o3("<image>Q", SAID, images=[]), "no image", ""),
    (mini_o3("<image><image>Q", SAID), "it is about several images", "2"),
    (mini_o3("<image>", SAID), "no question", ""),
    (mini_o3("<image>Q"), "no assistant turn", ""),
    (mini_o3("<image>Q", LOOK, SHOWN), "it does not begin with a question and end with an answer", None),
    ({"conversations": "[<grounding>"}, "its conversation is not JSON", None),
    ({"conversations": [{"from": "narrator", "value": "<grounding>"}]}, "a turn has an unknown speaker",
     "narrator"),
    ({"text": "?"}, "its format is unknown", "text"), ([], "it is no JSON object", "")])
def test_what_is_no_script_says_why(folder, record, reason, detail):
  good = mini_o3("<image>Q", SAID)
  found = read(write(folder / "x.json", [record, good]))
  assert list(found.scripts) == ["x.json:2"]
  ((where, why, more),) = found.left_out
  assert (where, why) == ("x.json:1", reason) and (detail is None or more == detail)


def sharegpt(*turns, **more):
  return {"conversations": [{"from": name, "value": value} for name, value in turns], "images": ["a.png"], **more}


def zoom(box, name="image_zoom_in_tool", **more):
  return json.dumps({"name": name, "arguments": {"bbox_2d": box, **more}})


def test_sharegpt_in_all_its_layouts(folder):
  call, end = zoom([20, 10, 80, 60]), ("gpt", "<think>Read.</think><answer>B</answer>")
  wanted = (script.Look("I look.", (20, 10, 80, 60), "thousandths"), script.Answer("Read.", "B"))
  records = [
      sharegpt(("human", "<image>Which?"), ("gpt", "I look."), ("function_call", call), ("observation", "<image>"),
               end),
      sharegpt(("human", "<image>Which?"), ("gpt", f"<think>I look.</think><tool_call>{call}</tool_call>"),
               ("human", "<tool_response><image></tool_response>"), end, tools="[...]"),
      {"messages": [{"role": "system", "content": "Tools."},
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]},
                    {"role": "assistant", "content": "I look.", "tool_calls": [{"function": json.loads(call)}]},
                    {"role": "tool", "content": "<image>"}, {"role": "assistant", "content": end[1]}],
       "images": [{"path": "a.png"}], "id": 7, "solution": "C"}]
  found = read(write(folder / "tools.jsonl", records, lines=True), frame="thousandths")
  assert not found.left_out and found.kinds == {"sharegpt": 3}
  assert [s.said for s in found.scripts.values()] == [wanted] * 3
  assert [s.task.question for s in found.scripts.values()] == ["Which?"] * 3
  assert [(s.task.uid, s.task.answers) for s in found.scripts.values()] == [
      ("tools.jsonl:1", ("B",)), ("tools.jsonl:2", ("B",)), ("7", ("C",))]


@pytest.mark.parametrize("call, reason, detail", [
    (zoom([1, 2, 3, 4], "web_search"), "an unknown action", "web_search"),
    ("{bbox", "its call is not JSON", "{bbox"), (zoom("1,2,3,4"), "its box is not four numbers", "1,2,3,4"),
    (zoom([1, 2, 3, 4], target_image=-1), "its box names an unknown image", "-1"),
    (zoom([1, 2, 3, 4]) + "</tool_call><tool_call>" + zoom([1, 2, 3, 4]), "several calls in a turn", None)])
def test_calls_that_are_none(folder, call, reason, detail):
  record = sharegpt(("human", "<image>Q"), ("gpt", f"<tool_call>{call}</tool_call>"), ("observation", "<image>"),
                    ("gpt", "A"))
  ((_, why, more),) = read(write(folder / "x.json", [record])).left_out
  assert why == reason and (detail is None or more == detail)


def rollout(uid="t", reward=1.0, correct=True, image="a.png", **more):
  turns = [{"role": "assistant", "text": "look", "ids": [4, 5], "learned": False}, {"role": "tool", "text": "seen"},
           {"role": "assistant", "text": "<answer>B</answer>"}]
  return {"uid": uid, "kind": "k", "question": "Which?", "options": None, "answers": ["B"], "boxes_gt": [[1, 2, 3, 4]],
          "reward": reward, "correct": correct, "image": image, "width": 200, "height": 100, "turns": turns, **more}


def uri(side, kind="PNG"):
  out = io.BytesIO()
  Image.new("RGB", side).save(out, kind)
  return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


def test_our_own_rollouts(folder):
  found = only(write(folder / "step.jsonl", [rollout()], lines=True))
  assert found.task == types.Task("t", str(folder / "a.png"), "Which?", ("B",), (types.Box(1, 2, 3, 4),), None, "k")
  assert found.said == (script.Verbatim("look", (4, 5), False), script.Verbatim("<answer>B</answer>"))
  assert (found.reward, found.correct, found.folder) == (1.0, True, "")
  # The original of a picture that was shrunk, or stored with loss, is looked up elsewhere.
  for image, whole in ((uri((200, 100)), True), (uri((100, 50)), False), (uri((200, 100), "JPEG"), False),
                       (None, False)):
    found = only(write(folder / "step.jsonl", [rollout(image=image)], lines=True))
    assert (isinstance(found.task.image, bytes), found.folder) == (whole, "" if whole else str(folder))
  ((_, why, more),) = read(write(folder / "x.jsonl", [{"uid": "t", "turns": [{}]}], lines=True)).left_out
  assert why == "it is no trajectory as a run writes it" and more == "KeyError: 'role'"


def test_rejection_sampling(folder):
  lines = [rollout("a", 0.5), rollout("a", 2.0), rollout("a", 1.0, False), rollout("b", 1.5), rollout("b", 1.5),
           rollout("c", None, None)]
  path = write(folder / "step.jsonl", lines, lines=True)
  numbers = lambda **choice: [int(where.rpartition(":")[2]) for where in read(path, **choice).scripts]
  assert numbers() == [1, 2, 4, 5, 6]
  assert numbers(only_right=False) == [1, 2, 3, 4, 5, 6]
  assert numbers(least_reward=1.5) == [2, 4, 5, 6], "what earned nothing that is known is not measured by it"
  assert numbers(best_of=1) == [2, 4, 6] and numbers(best_of=2, only_right=False) == [2, 3, 4, 5, 6]
  found = read(path, least_reward=1.0, best_of=1)
  assert [(where, why) for where, why, _ in found.not_chosen] == [
      ("step.jsonl:1", "it earned less than sft.least_reward"), ("step.jsonl:3", "its answer is wrong"),
      ("step.jsonl:5", "others of its task earned more")] and not found.left_out


def test_which_files_a_path_means(folder):
  workdir = folder / "run"
  (workdir / "rollouts").mkdir(parents=True)
  for name in ("before", "step_000002", "step_000001", "after"):
    write(workdir / "rollouts" / f"{name}.jsonl", [rollout(name)], lines=True)
  assert [f.name for f in table.files_of(str(workdir))] == ["step_000001.jsonl", "step_000002.jsonl"], (
      "before and after are about held-out tasks")
  for wrong in (folder / "nope.json", folder):
    with pytest.raises(ValueError, match="^--data must be a file of trajectories .*, or a run's workdir"):
      table.files_of(str(wrong))
  (folder / "cut.json").write_text('[{"uid": ')
  with pytest.raises(ValueError, match="cut.json must be a JSON list, or JSON lines"):
    read(str(folder / "cut.json"))
  (folder / "cut.jsonl").write_text(json.dumps(rollout()) + '\n{"uid": ')
  found = read(str(folder / "cut.jsonl"))
  assert len(found.scripts) == 1 and found.left_out == (("cut.jsonl:2", "it is no JSON object", ""),)
