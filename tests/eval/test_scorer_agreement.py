"""Five hundred generated answers for each benchmark, scored by ours and by a second reading of each published rule.

The second readings share no code with ours, and are as slow and plain as they can be.
"""

import random
import re

import numpy as np
import pytest

from virl_jax import types
from virl_jax.eval.benchmarks import docvqa
from virl_jax.eval.benchmarks import hrbench
from virl_jax.eval.benchmarks import infographicsvqa
from virl_jax.eval.benchmarks import mme_realworld
from virl_jax.eval.benchmarks import pope
from virl_jax.eval.benchmarks import records
from virl_jax.eval.benchmarks import rows as rows_lib
from virl_jax.eval.benchmarks import textvqa
from virl_jax.eval.benchmarks import treebench
from virl_jax.eval.benchmarks import visualprobe
from virl_jax.eval.benchmarks import vstar

N = 500
WORDS = ("red", "blue", "a dog", "two dogs", "the cat", "Stop sign", "3", "1,000", "10.5", "don't", "o'clock",
         "new-york", "on the left", "none", "U.S.", "50%", "$5.00", "yes", "no", "st. john's")


def predicted(tasks, texts):
  return {task.uid: [rows_lib.Prediction(text)] for task, text in zip(tasks, texts, strict=True)}


# --- options


def choices(rng, kinds, groups=("",), letters="ABCD"):
  tasks, group = [], {}
  for i in range(N):
    texts = [f"The {w} thing is {c}." for w in ("big", "old", "tall") for c in ("red", "blue", "wet")]
    options = tuple(rng.sample(texts, len(letters)))
    tasks.append(types.Task(f"t{i}", "", "?", (rng.choice(options),), (), options, kinds[i % len(kinds)], "options"))
    group[f"t{i}"] = groups[i // len(kinds) % len(groups)]
  return rows_lib.Loaded(tuple(tasks), (), group)


def answered(rng, task):
  """An answer like a policy's: a letter, a letter and a text (perhaps another's), a text, or words for no option."""
  letter, text = rng.choice("ABCDE"), rng.choice(task.options)
  return rng.choice((letter, f"({letter})", f"{letter}.", f"{letter}. {text}", f"{letter}) {text}",
                     f"({letter}) {text}", f" {letter}\n", text, text.lower(), text.rstrip("."), f"{letter}: {text}",
                     "I cannot see it.", "None of them", "", "A thing that is not there", "It is blue",
                     f"{letter}\nas one can see"))


def right_by_letter(task, text):
  """Whether the letter that an answer begins with is right or, without one, its text, up to case and full stop."""
  text = text.strip()
  bare = text[1:] if text.startswith("(") else text
  if bare[:1] in tuple("ABCDE") and (len(bare) == 1 or bare[1] in ").:\n"):
    at = "ABCDE".index(bare[0])
    return at < len(task.options) and task.options[at] == task.answers[0]
  return text.rstrip(".").lower() == task.answers[0].rstrip(".").lower() != ""


def by_hand(loaded, texts):
  return [(task, loaded.group[task.uid], float(right_by_letter(task, text)))
          for task, text in zip(loaded.tasks, texts, strict=True)]


def average(values):
  values = list(values)
  return sum(values) / len(values)


@pytest.mark.parametrize("seed", range(3))
def test_vstar(seed):
  rng = random.Random(seed)
  loaded = choices(rng, vstar.CATEGORIES)
  texts = [answered(rng, task) for task in loaded.tasks]
  figures, rows = vstar.score(loaded, predicted(loaded.tasks, texts))["figures"], by_hand(loaded, texts)
  assert 0.1 < figures["overall"] < 0.6, "the cases are worth it"
  assert figures["overall"] == pytest.approx(average(s for *_, s in rows))
  for kind in vstar.CATEGORIES:
    assert figures[kind] == pytest.approx(average(s for task, _, s in rows if task.kind == kind))


@pytest.mark.parametrize("seed", range(3))
def test_hrbench(seed):
  rng = random.Random(seed)
  loaded = choices(rng, ("single", "cross"), "0123")
  keep = [t for t in loaded.tasks if rng.random() < 0.8 or loaded.group[t.uid] == "3"]  # cycles of different sizes
  loaded = rows_lib.Loaded(tuple(keep), (), loaded.group)
  texts = [answered(rng, task) for task in loaded.tasks]
  figures, rows = hrbench.score(loaded, predicted(loaded.tasks, texts))["figures"], by_hand(loaded, texts)
  for name, wanted in (("average", {"single", "cross"}), ("single", {"single"}), ("cross", {"cross"})):
    per_cycle = [average(s for task, cycle, s in rows if cycle == c and task.kind in wanted) for c in "0123"]
    assert figures[name] == pytest.approx(average(per_cycle))
  assert figures["pooled"] == pytest.approx(average(s for *_, s in rows)) != pytest.approx(figures["average"], abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_mme_realworld(seed):
  rng = random.Random(seed)
  kinds = ("perception/ocr", "perception/monitoring", "reasoning/ocr", "perception/ocr")
  loaded = choices(rng, kinds, letters="ABCDE")
  texts = [answered(rng, task) for task in loaded.tasks]
  figures, rows = mme_realworld.score(loaded, predicted(loaded.tasks, texts))["figures"], by_hand(loaded, texts)
  share = lambda start: average(s for task, _, s in rows if task.kind.startswith(start))
  assert figures["overall"] == pytest.approx(share(""))
  assert figures["perception"]["accuracy"] == pytest.approx(share("perception"))
  assert figures["perception"]["mean_of_subtasks"] == pytest.approx(
      (share("perception/ocr") + share("perception/monitoring")) / 2)
  assert figures["reasoning"]["subtasks"] == {"ocr": pytest.approx(share("reasoning/ocr"))}


@pytest.mark.parametrize("seed", range(2))
def test_treebench(seed):
  """IoUs by counting pixels."""
  rng = random.Random(seed)
  def box():
    x, y = rng.randrange(40), rng.randrange(40)
    return types.Box(x, y, x + rng.randrange(1, 20), y + rng.randrange(1, 20))
  loaded = choices(rng, ("Perception/OCR", "Reasoning/Order"))
  tasks = [types.Task(t.uid, "", "?", t.answers, tuple(box() for _ in range(rng.randrange(1, 4))), t.options, t.kind,
                      t.match) for t in loaded.tasks]
  texts, looked = [answered(rng, t) for t in tasks], [tuple(box() for _ in range(rng.randrange(4))) for _ in tasks]
  figures = treebench.score(rows_lib.Loaded(tuple(tasks)), {
      t.uid: [rows_lib.Prediction(text, boxes)] for t, text, boxes in zip(tasks, texts, looked)})["figures"]
  def pixels(b):
    canvas = np.zeros((64, 64), bool)
    canvas[int(b.y1):int(b.y2), int(b.x1):int(b.x2)] = True
    return canvas
  slow = []
  for task, boxes in zip(tasks, looked):
    best = [max([(pixels(true) & pixels(b)).sum() / (pixels(true) | pixels(b)).sum() for b in boxes], default=0.0)
            for true in task.boxes]
    slow.append(average(best))
  assert figures["mIoU"] == pytest.approx(average(slow)) and figures["mIoU"] > 0.01
  assert figures["accuracy"] == pytest.approx(average(s for *_, s in by_hand(loaded, texts)))


# --- yes and no


@pytest.mark.parametrize("seed", range(3))
def test_pope(seed):
  rng = random.Random(seed)
  parts = ("Yes", "No", "no", "not", "yes", "there is", "a dog", "NO", "none", ",", ".", "not.", "No,", "\n", "  ",
           "nothing")
  tasks = [types.Task(f"coco/{split}/{i}", "", "?", (rng.choice(("yes", "no")),), kind=split, match="yes_no")
           for split in pope.SPLITS for i in range(N // 3 + 1)]
  loaded = rows_lib.Loaded(tuple(tasks), (), {t.uid: f"coco/{t.kind}" for t in tasks})
  texts = [rng.choice(("", " ")).join(rng.choice(parts) for _ in range(rng.randrange(5))) for _ in tasks]
  texts = [rng.choice((text, " ".join(text.split()))) for text in texts]
  result = pope.score(loaded, predicted(tasks, texts))

  def slow(pairs):
    table = {(said, label): 0 for said in (0, 1) for label in (0, 1)}
    for text, label in pairs:
      sentence = text if "." not in text else text[:text.index(".")]
      words = re.split(" ", re.sub(",", "", sentence))
      said = 0 if any(word in ("No", "not", "no") for word in words) else 1
      table[said, 0 if label == "no" else 1] += 1
    precision = table[1, 1] / (table[1, 1] + table[1, 0])
    recall = table[1, 1] / (table[1, 1] + table[0, 1])
    return {"accuracy": (table[1, 1] + table[0, 0]) / len(pairs), "precision": precision, "recall": recall,
            "F1": 2 * precision * recall / (precision + recall), "yes_ratio": (table[1, 1] + table[1, 0]) / len(pairs)}

  each = {split: slow([(text, t.answers[0]) for t, text in zip(tasks, texts) if t.kind == split])
          for split in pope.SPLITS}
  for split, found in each.items():
    ours = result["figures"]["splits"][f"coco/{split}"]
    assert {name: ours[name] for name in found} == pytest.approx(found)
  for name in each["random"]:
    assert result["figures"][name] == pytest.approx(average(found[name] for found in each.values()))
  assert 0.1 < each["random"]["yes_ratio"] < 0.9


# --- texts


def blurred(rng, text):
  """A text as somebody might write it, or almost this text."""
  for _ in range(rng.randrange(3)):
    text = rng.choice((text.upper(), text + ".", f"the {text}", text + "!", text.replace("'", ""), f" {text} ",
                       text + "?", text.replace(" ", "  "), f"({text})", text + "s", text[1:], text.replace("-", " "),
                       f"{text}; ok", text.replace(",", ""), f"'{text}'", text.replace("2", "two"), f"a {text}",
                       text + "\n"))
  return text


def server_form(text):
  """The normal form of the VQA servers, written again from its description, a character at a time."""
  text = text.lower()
  for gone in ",?":
    text = "".join(c for c in text if c != gone)
  text = " 's".join(text.split("'s"))
  text = "".join(" " if c in "\n\t" else c for c in text.strip()).strip()
  marks = list(';/[]"{}()=+\\_-><@`!')
  beside = {m for m in marks for i, c in enumerate(text) if c == m and (
      i + 1 < len(text) and text[i + 1] == " " or i > 0 and text[i - 1] == " ")}
  text = "".join("" if c in beside else " " if c in marks else c for c in text)
  text = "".join(c for i, c in enumerate(text) if c != "." or i + 1 < len(text) and text[i + 1].isdigit())
  digits = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "ten": "10"}
  fixed = {"dont": "don't", "oclock": "o'clock"}
  words = [digits.get(word, word) for word in text.split()]
  return " ".join(fixed.get(word, word) for word in words if word not in ("a", "an", "the"))


@pytest.mark.parametrize("seed", range(3))
def test_textvqa(seed):
  rng = random.Random(seed)
  tasks = []
  for i in range(N):
    said = [blurred(rng, word) for word in rng.sample(WORDS, 3)]
    tasks.append(types.Task(f"{i}", "", "?", tuple(rng.choices(said, (6, 2, 1), k=10)), match="vqa"))
  texts = [blurred(rng, rng.choice(task.answers)) for task in tasks]
  result = textvqa.score(rows_lib.Loaded(tuple(tasks)), predicted(tasks, texts))
  slow = []
  for task, text in zip(tasks, texts):
    people, one = [server_form(a) for a in task.answers], server_form(text)
    per_person = []
    for left_out in range(10):
      others = [a for i, a in enumerate(people) if i != left_out]
      per_person.append(min(1.0, sum(a == one for a in others) / 3))
    slow.append(average(per_person) if one in people else 0.0)
  assert [row["score"] for row in result["rows"]] == pytest.approx(slow)
  assert result["score"] == pytest.approx(average(slow)) and 0.2 < result["score"] < 0.9


def edits(a, b):
  """The edit distance, by rows of numpy."""
  row = np.arange(len(b) + 1)
  for i, c in enumerate(a, 1):
    new = np.minimum(row[1:] + 1, row[:-1] + np.array([c != d for d in b], int))
    row = np.concatenate(([i], new))
    for j in range(1, len(row)):
      row[j] = min(row[j], row[j - 1] + 1)
  return int(row[-1])


@pytest.mark.parametrize("module", [docvqa, infographicsvqa])
@pytest.mark.parametrize("seed", range(2))
def test_anls(module, seed):
  rng = random.Random(seed)
  tasks = [types.Task(f"{i}", "", "?", tuple(blurred(rng, w) for w in rng.sample(WORDS, rng.randrange(1, 4))),
                      match="anls") for i in range(N)]
  texts = [rng.choice(("", "   ", blurred(rng, rng.choice(WORDS)), *[blurred(rng, rng.choice(t.answers))] * 4))
           for t in tasks]
  result = module.score(rows_lib.Loaded(tuple(tasks)), predicted(tasks, texts))
  slow = []
  for task, text in zip(tasks, texts):
    values = []
    for reference in task.answers:
      distance = edits(" ".join(reference.strip().lower().split()), " ".join(text.strip().lower().split()))
      length = max(len(reference), len(text))
      values.append(0.0 if length == 0 else distance / length)
    similarity = 1 - min(values)
    slow.append(similarity if similarity >= 0.5 else 0.0)
  assert [row["score"] for row in result["rows"]] == pytest.approx(slow)
  assert result["score"] == pytest.approx(average(slow)) and 0.2 < result["score"] < 0.9


@pytest.mark.parametrize("seed", range(2))
def test_visualprobe_and_records(seed):
  """Answers that are the reference up to case, blanks and marks at the ends; and the most frequent of eight."""
  rng = random.Random(seed)
  plain = ("red car", "stop sign", "42", "north", "k9 unit", "left")
  tasks = [types.Task(f"{i}", "", "?", (rng.choice(plain),), kind=("easy", "hard")[i % 2]) for i in range(N)]
  dress = lambda t: rng.choice((t, t.upper(), f" {t} ", f"{t}.", f'"{t}"', f"{t}!", t.replace(" ", "  ")))
  # An even number of samples, so that there are ties.
  samples = {t.uid: [dress(rng.choice((t.answers[0], *plain))) for _ in range(8)] for t in tasks}
  bare = lambda text: " ".join(text.lower().strip(' ."!').split())
  right = {t.uid: [bare(s) == t.answers[0] for s in samples[t.uid]] for t in tasks}
  majority = []
  for task in tasks:
    said = [bare(s) for s in samples[task.uid]]
    votes = sorted(set(said), key=lambda s: (-said.count(s), said.index(s)))
    majority.append(votes[0] == task.answers[0])
  loaded = rows_lib.Loaded(tuple(tasks))
  found = {uid: [rows_lib.Prediction(s) for s in texts] for uid, texts in samples.items()}
  figures = visualprobe.score(loaded, found)["figures"]
  assert figures["average"] == pytest.approx(average(average(r) for r in right.values()))
  assert figures["majority"] == pytest.approx(average(majority)) and figures["samples"] == [8, 8]
  assert figures["levels"]["hard"] == pytest.approx(average(average(right[t.uid]) for t in tasks if t.kind == "hard"))
  first = {uid: found[uid][:1] for uid in found}
  assert records.score(loaded, first)["score"] == pytest.approx(average(r[0] for r in right.values()))
