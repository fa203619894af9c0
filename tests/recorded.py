"""Small files of demonstrations, for tests: a grey picture each, a zoom and an answer."""

import json

from PIL import Image

from virl_jax.data import prompt
from virl_jax.rollout.actions import zoom


def line(number: int, image: str, box=(10, 10, 40, 40), **more) -> dict:
  """A demonstration as a file of rollouts has it."""
  texts = prompt.call_text(zoom.call(box), "the left one"), prompt.answer_text("rows", "rows" * (number % 3))
  return {"uid": f"demo {number}", "kind": "grey", "question": "Which pattern is on the left tile?", "options": None,
          "answers": ["rows"], "boxes_gt": [[20, 20, 80, 80]], "reward": None, "correct": True, "image": image,
          "turns": [{"role": "assistant", "text": text} for text in texts], **more}


def write(folder, count: int, size=(252, 252)) -> str:
  """A file of so many."""
  folder.mkdir(exist_ok=True)
  for i in range(count):
    Image.new("RGB", size, (20 * i % 256, 90, 90)).save(folder / f"{i}.png")
  return save(folder / "demos.jsonl", [line(i, f"{i}.png", (10 + i, 10, 40 + i, 40)) for i in range(count)])


def save(path, lines: list[dict]) -> str:
  """JSON lines."""
  path.write_text("".join(json.dumps(each) + "\n" for each in lines))
  return str(path)
