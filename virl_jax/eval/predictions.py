"""Predictions of any policy: our own files, and those that others publish.

    layout            what a row has                                              for
    ours              uid, answer or text; sample, boxes                          all benchmarks
    VLMEvalKit        index, prediction (a table with tabs, or JSON)              tasks that are named by index
    DeepEyes          image, question, answer, prompt_text, pred_ans              vstar
    lowest loss       input_image, question, options, output (an index)           vstar
    ZoomEye           index, category, answer and output, a letter a cycle        hrbench
    LLaVA             question_id, text; category or prompt                       pope, textvqa
    submission        question_id or questionId, answer                           textvqa, docvqa, infographicsvqa
    with references   questionId, question, predicted_answer, ground_truth        docvqa, infographicsvqa
    template          Question_id, ..., "Ground truth", Output                    mme_realworld

Some layouts also hold questions and references, so that they can be scored without the benchmark's own files; letters
then mean the options of their own prompts.
"""

from __future__ import annotations

from collections.abc import Callable
import csv
import dataclasses
import io
import os
import re

from virl_jax import types
from virl_jax.data import choice
from virl_jax.data import tables
from virl_jax.eval.benchmarks import choices
from virl_jax.eval.benchmarks import mme_realworld
from virl_jax.eval.benchmarks import rows as rows_lib
from virl_jax.eval.benchmarks import treebench
from virl_jax.eval.benchmarks import vstar

_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
_BARE = rows_lib.How(need_images=False, seed=None)

# Tables that others' programs read, and whether a prediction's text has the boxes that the policy looked at.
TABLES = {"vlmevalkit": False, "treebench": True}


@dataclasses.dataclass(frozen=True)
class Read:
  """A file of predictions.

  Attributes:
    layout: a name from the module's table.
    loaded: the benchmark's tasks, or those that the file holds itself.
    predictions: by uid.
    strange: uids of predictions for which there is no task.
    rejects: rows that could not be used.
  """

  layout: str
  loaded: rows_lib.Loaded
  predictions: rows_lib.Predictions
  strange: tuple[str, ...] = ()
  rejects: tuple[rows_lib.Reject, ...] = ()


def read(path: str, benchmark: str, loaded: rows_lib.Loaded | None) -> Read:
  """Reads a file of predictions for a benchmark.

  Args:
    path: of the file.
    benchmark: its name, as `table.BENCHMARKS` has it.
    loaded: its tasks, and their options, in the order of its files; None if the predictions hold their own tasks.

  Raises:
    ValueError: the file has no layout that is known for this benchmark, needs the benchmark's own files, or has no
      prediction for their tasks.
  """
  found = list(tables.tsv(path, ())) if path.endswith(".tsv") else tables.json_rows(path)
  return of_rows(found, path, benchmark, loaded)


def of_rows(found: list, path: str, benchmark: str, loaded: rows_lib.Loaded | None) -> Read:
  """`read` for rows that have been read already."""
  first = next((row for row in found if isinstance(row, dict)), {})
  layouts = _LAYOUTS.get(benchmark, ()) + _ALWAYS
  for name, keys, reader in layouts:
    if keys <= set(first):
      return _collect(name, reader, found, path, loaded)
  wanted = "; ".join(f"{name} ({', '.join(sorted(keys))})" for name, keys, _ in layouts)
  raise ValueError(f"{path} must have predictions for {benchmark} in one of these layouts: {wanted}. Received: rows "
                   f"with {', '.join(sorted(map(str, first))) or 'nothing'}")


def prediction(raw: str) -> rows_lib.Prediction:
  """A raw text as a prediction: the text in its last answer tag, or all of it, and the boxes that it has in TreeBench's
  form."""
  answers = _ANSWER.findall(raw)
  return rows_lib.Prediction(answers[-1].strip() if answers else raw, treebench.written(raw))


def table(found: Read, with_boxes: bool) -> str:
  """Predictions as VLMEvalKit's programs read them: index, question, options, answer, category, prediction.

  Args:
    found: predictions and tasks; only the first of several samples is used.
    with_boxes: whether the boxes that the policy looked at are put before the answer, in whole pixels of the original
      and the only form that TreeBench reads: <think><box>[x1,y1,x2,y2]</box></think>.

  Returns:
    A table with tabs between its columns.
  """
  letters = rows_lib.LETTERS[:max((len(t.options or ()) for t in found.loaded.tasks), default=0)]
  out = io.StringIO()
  write = csv.writer(out, delimiter="\t", lineterminator="\n").writerow
  write(["index", "question", *letters, "answer", "category", "prediction"])
  for task in found.loaded.tasks:
    for said in found.predictions.get(task.uid, ())[:1]:
      options = list(task.options or ())
      answer = next(iter(task.answers), "")
      right = letters[options.index(answer)] if answer in options else answer
      boxes = "".join(f"<box>[{','.join(str(round(v)) for v in box)}]</box>" for box in said.boxes)
      text = f"<think>{boxes}</think><answer>{said.text}</answer>" if with_boxes else said.text
      write([task.uid, task.question, *options, *[""] * (len(letters) - len(options)), right, task.kind, text])
  return out.getvalue()


class _Found:
  """Predictions as they are found, by uid, and tasks that came with them."""

  def __init__(self, path: str, loaded: rows_lib.Loaded | None):
    self.path, self.loaded = path, loaded
    self.own = rows_lib.Reader(_BARE, os.path.dirname(path))
    self.predictions: dict[str, list[rows_lib.Prediction]] = {}
    self._tasks = {} if loaded is None else {task.uid: task for task in loaded.tasks}

  def need(self, layout: str) -> rows_lib.Loaded:
    """The benchmark's own tasks.

    Raises:
      ValueError: they were not given.
    """
    if self.loaded is None:
      raise ValueError(f"{self.path} must come with the benchmark's own files (--data): predictions of the layout "
                       f"{layout!r} hold no references")
    return self.loaded

  def put(self, uid: str, text: str | rows_lib.Prediction) -> None:
    self.predictions.setdefault(uid, []).append(prediction(text) if isinstance(text, str) else text)

  def with_task(self, number: int, task: types.Task, text: str, group: str | None = None) -> None:
    """A prediction with its own question and references.

    Raises:
      Unusable: see `at_home`.
    """
    self.own.add(number, task.uid, lambda: task, group)
    self.put(task.uid, self.at_home(task.uid, task.options, text))

  def at_home(self, uid: str, options: tuple[str, ...] | None, text: str) -> str:
    """An answer to options that were in another order, with the letter of the benchmark's file.

    Raises:
      Unusable: the benchmark's file has the task, but not the option that was picked.
    """
    task = self._tasks.get(uid)
    picked = choice.letter(text, options) if task is not None and task.options and options else None
    if picked is None:
      return text
    if options[picked] not in task.options:
      raise tables.Unusable("picked an option that the benchmark's file has not")
    return rows_lib.LETTERS[task.options.index(options[picked])]


def _collect(name, reader, found, path, loaded) -> Read:
  it, rejects = _Found(path, loaded), []
  take = reader(it, found)
  for number, row in enumerate(found, 1):
    try:
      take(number, tables.columns(row) if path.endswith(".tsv") else row)
    except tables.Unusable as why:
      rejects.append(rows_lib.Reject(number, "", str(why)))
  about = loaded if loaded is not None else it.own.loaded()
  known = {task.uid for task in about.tasks} | {r.name for r in about.rejects}
  strange = tuple(uid for uid in it.predictions if uid not in known)
  if not set(it.predictions) & known:
    such = ", ".join(map(repr, strange[:3])) or "; ".join(f"row {r.row}: {r.cause}" for r in rejects[:3])
    raise ValueError(f"{path} must have predictions for the benchmark's tasks. Received: none of {len(found)} rows is "
                     f"about one ({name}: {such or 'no row'}; tasks are named as "
                     f"{', '.join(repr(t.uid) for t in about.tasks[:3])})")
  return Read(name, about, it.predictions, strange, tuple(rejects))


# Readers of the layouts.  Each takes what is being collected and all rows, and returns what reads one row:
# (number, row) -> None.


def _ours(it: _Found, _):
  it.need("ours")

  def take(_, row):
    for key in ("skipped", "lost"):
      if isinstance(row, dict) and key in row:
        raise tables.Unusable(f"{key}: {row[key]}")
    answer = tables.get(row, "answer", "text")
    if answer is not None and not isinstance(answer, str):
      raise tables.Unusable("answer is not text")
    found, uid = prediction(answer or ""), tables.text(row, "uid")
    if row.get("options"):  # as they were shown, perhaps in another order than in the benchmark's file
      found = dataclasses.replace(found, text=it.at_home(uid, tables.texts(row, "options"), found.text))
    if isinstance(row.get("boxes"), list):
      found = dataclasses.replace(found, boxes=tuple(types.Box(*box) for box in row["boxes"]))
    it.put(uid, found)

  return take


def _vlmevalkit(it: _Found, _):
  it.need("VLMEvalKit")
  return lambda _, row: it.put(tables.text(row, "index"), tables.text(row, "prediction", empty=True))


def _deepeyes(it: _Found, _):
  kind = next((name for name in vstar.CATEGORIES if name in os.path.basename(it.path)), "vstar")

  def take(number, row):
    question, options = tables.text(row, "question"), choices.block(tables.text(row, "prompt_text"))
    uid = f"{kind}/{os.path.splitext(tables.text(row, 'image'))[0]}"
    it.with_task(number, types.Task(uid, "", question, (tables.text(row, "answer"),), (), options, kind, "options"),
                 tables.text(row, "pred_ans", empty=True))

  return take


def _lowest_loss(it: _Found, _):
  def take(number, row):
    options, index = tables.texts(row, "options"), tables.get(row, "output")
    if not isinstance(index, int) or not 0 <= index < len(options):
      raise tables.Unusable("output is the index of no option")
    uid = os.path.splitext(tables.text(row, "input_image"))[0]
    it.with_task(number, types.Task(uid, "", tables.text(row, "question"), options[:1], (), options,
                                    tables.text(row, "test_type"), "options"), rows_lib.LETTERS[index])

  return take


def _zoomeye(it: _Found, _):
  def take(number, row):
    right, given, index = tables.texts(row, "answer"), tables.texts(row, "output"), tables.get(row, "index")
    if not isinstance(index, int) or len(right) != len(given):
      raise tables.Unusable("not as many outputs as answers")
    letters = tuple(rows_lib.LETTERS[:max(4, len(right))])
    for cycle, (answer, output) in enumerate(zip(right, given)):
      uid, kind = str(index + cycle), tables.text(row, "category")
      it.own.add(number, uid, lambda uid=uid, kind=kind, answer=answer: types.Task(
          uid, "", "", (answer,), (), letters, kind, "options"), str(cycle))
      it.put(uid, output)

  return take


def _llava_pope(it: _Found, found):
  """Answers are paired with questions by their order within a split, because ids have an offset in each split, or none.
  The pairs count only if there are as many answers as questions, or if the prompts are the questions."""
  loaded = it.need("LLaVA")
  if loaded.rejects:
    raise ValueError(f"{it.path} pairs with the benchmark's rows by their order, so that none may be missing. "
                     f"Received: {loaded.describe()}")
  tasks: dict[str, list[types.Task]] = {}
  for task in loaded.tasks:
    tasks.setdefault(loaded.group[task.uid].rpartition("/")[2], []).append(task)
  split_of = _splits(it.path, found, tasks)
  given: dict[str, int] = {}
  for row in found:
    split = split_of(row)
    given[split] = given.get(split, 0) + 1
  at = dict.fromkeys(tasks, 0)

  def take(_, row):
    split = split_of(row)
    if split not in tasks:
      raise tables.Unusable("a split that the benchmark's files have not")
    k, at[split] = at[split], at[split] + 1
    task = tasks[split][k] if k < len(tasks[split]) else None
    asked = tables.text(row, "prompt").partition("\n")[0].strip() if "prompt" in row else ""
    same = task is not None and (
        _spelt(task.question) == _spelt(asked) if asked and task.question else given[split] == len(tasks[split]))
    if not same:
      raise ValueError(f"{it.path} must answer the benchmark's questions of the split {split!r} in their order. "
                       f"Received: {given[split]} answers for {len(tasks[split])} questions; number {k + 1} may be "
                       "another (the random split had 2,910 in an older release)")
    it.put(task.uid, tables.text(row, "text", empty=True))

  return take


def _spelt(question: str) -> str:
  """A question of POPE; the older release misspells a word in some."""
  return question.strip().replace("imange", "image")


def _splits(path, found, tasks) -> Callable[[dict], str]:
  """Gives the split of an answer: as it says, as the file of questions beside it says, or the only one there is."""
  if any(isinstance(row, dict) and "category" in row for row in found):
    return lambda row: str(tables.get(row, "category"))
  folder, name = os.path.split(path)
  beside = os.path.join(folder, name.replace("answers", "questions"))
  if beside != path and os.path.isfile(beside):
    said = {row.get("question_id"): str(row.get("category")) for row in tables.json_rows(beside)
            if isinstance(row, dict)}
    return lambda row: said.get(tables.get(row, "question_id"), "")
  if len(tasks) == 1:
    return lambda row: next(iter(tasks))
  raise ValueError(f"{path} must say which split an answer is of, under category, or with its questions in {beside}")


def _llava_textvqa(it: _Found, _):
  """LLaVA's question_id is the image's id."""
  tasks: dict[tuple[str, str], list[str]] = {}
  for task in it.need("LLaVA").tasks:
    image = os.path.splitext(os.path.basename(task.image))[0]
    tasks.setdefault((image, task.question.strip().lower()), []).append(task.uid)

  def take(_, row):
    image = tables.text(row, "question_id")
    question = tables.text(row, "question", "prompt").partition("\n")[0].strip().lower()
    for uid in tasks.get((image, question), [f"{image}: {question}"]):
      it.put(uid, tables.text(row, "text", empty=True))

  return take


def _submission(it: _Found, _):
  it.need("submission")
  return lambda _, row: it.put(tables.text(row, "question_id", "questionId"), tables.text(row, "answer", empty=True))


def _with_references(it: _Found, _):
  def take(number, row):
    said = tables.get(row, "predicted_answer")
    it.with_task(number, types.Task(tables.text(row, "questionId"), "", tables.text(row, "question"),
                                    tables.texts(row, "ground_truth"), match="anls"),
                 "" if said is None else tables.text(row, "predicted_answer", empty=True))

  return take


def _template(it: _Found, _):
  """The file of questions with an output in each row, so that its tasks are read as the benchmark's file is."""
  own = {task.uid: task for task in mme_realworld.load(it.path, _BARE).tasks}

  def take(number, row):
    uid = tables.text(row, "Question_id")
    if uid not in own:
      raise tables.Unusable("not a question that can be used")
    it.with_task(number, own[uid], tables.text(row, "Output", empty=True))

  return take


_SUBMISSIONS = (("submission", {"questionId", "answer"}, _submission),
                ("with references", {"questionId", "predicted_answer", "ground_truth"}, _with_references))
# By benchmark: a layout's name, the keys that identify it, and its reader.
_LAYOUTS = {
    "vstar": (("DeepEyes", {"image", "question", "answer", "pred_ans", "prompt_text"}, _deepeyes),
              ("lowest loss", {"input_image", "test_type", "options", "output"}, _lowest_loss)),
    "pope": (("LLaVA", {"question_id", "text"}, _llava_pope),),
    "textvqa": (("LLaVA", {"question_id", "text"}, _llava_textvqa),
                ("submission", {"question_id", "answer"}, _submission)),
    "docvqa": _SUBMISSIONS,
    "infographicsvqa": _SUBMISSIONS,
    **dict.fromkeys(("hrbench4k", "hrbench8k"), (("ZoomEye", {"index", "answer", "output"}, _zoomeye),)),
    **dict.fromkeys(("mme_realworld", "mme_realworld_lite"),
                    (("template", {"Question_id", "Ground truth", "Output"}, _template),)),
}
_ALWAYS = (("ours", {"uid", "answer"}, _ours), ("ours", {"uid", "text"}, _ours),
           ("VLMEvalKit", {"index", "prediction"}, _vlmevalkit))
