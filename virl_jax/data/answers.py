"""How answers are judged: the rules, by the names that tasks have for them, and what a rollout's answers are worth.

A rule gives a score in [0, 1]:

    exact       1 or 0: the answer is one of the accepted ones, as a whole (`exact`)
    options     1 or 0: the option that an answer names first, as benchmarks read it (`choice`)
    yes_no      1 or 0: the answer begins with yes or no, and does not say the other (`choice`)
    number      1 or 0: value and unit; "number:2%" and "number:0.5" allow a difference (`quantity`)
    list        the share of the items, in any order; naming others costs as much (`quantity`)
    anls        1 less the edit distance by the length, 0 below one half: DocVQA, InfographicsVQA (`official`)
    vqa         how many of ten people said so: TextVQA (`official`)

`exact` is for rewards: it alone cannot be won by accident.  The others count as benchmarks do, or the sets that these
are from (except that `anls` here ignores repeated blanks, which a policy could pad an answer with).  A rule's score is
what the reward pays (`types.Batch.answer_B`) and what `acc_ans` averages, so that acc_ans is the benchmark's figure; an
answer counts as right if its score is at least `RIGHT`.

Source: ours, except the rules of benchmarks, each of which names its source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools

from virl_jax import types
from virl_jax.data import choice
from virl_jax.data import exact
from virl_jax.data import official
from virl_jax.data import quantity

RIGHT = 0.5  # the least score of a right answer: ANLS gives 0 below it, and VQA 0.6 for two of ten people

# (answer, accepted answers, options) -> score.
RULES: dict[str, Callable[[str | None, tuple[str, ...], tuple[str, ...] | None], float]] = {
    "exact": exact.matches,
    "options": choice.option,
    "yes_no": choice.yes_no,
    "number": quantity.number,
    "list": quantity.items,
    "anls": official.anls_of_words,
    "vqa": official.vqa,
}
_PICKS = (exact.matches, choice.option, choice.yes_no)  # rules that pick one of the options, if there are any
# Rules that take an argument behind a colon, and what parses it.
_ARGUMENTS = {"number": quantity.tolerance}

matches, normalize, right = exact.matches, exact.normalize, exact.right  # older names of these


def rule(match: str) -> Callable[[str | None, tuple[str, ...], tuple[str, ...] | None], float]:
  """The rule of that name: (answer, accepted answers, options) -> score in [0, 1].

  Args:
    match: a key of `RULES`, followed by a colon and an argument if the rule takes one: "number:2%".

  Raises:
    ValueError: there is no such rule, or it takes no such argument.
  """
  name, colon, argument = match.partition(":")
  if name not in RULES or colon and name not in _ARGUMENTS:
    raise ValueError(f"match must be one of {', '.join(RULES)}. Received: {match!r}")
  return functools.partial(RULES[name], within=_ARGUMENTS[name](argument)) if colon else RULES[name]


def attainable(match: str, answers: tuple[str, ...], options: tuple[str, ...] | None = None) -> float:
  """The best score that one of the accepted answers gets by the task's own rule; at 0 no answer can be right.

  Args:
    match: see `rule`.
    answers: the accepted answers.
    options: the texts of options A, B, C ..., or None.

  Raises:
    ValueError: see `rule`.
  """
  judge = rule(match)
  if options and judge in _PICKS:  # the text of an option may look like the letter of another
    return float(bool(exact.right(answers, options)))
  return max((float(judge(answer, answers, options)) for answer in set(answers)), default=0.0)


def grade(trajectories: Sequence[types.Trajectory],
          judge: Callable[[Sequence[types.Trajectory]], Sequence[float | None]] | None = None) -> None:
  """Scores each trajectory's answer by its task's rule; a trajectory without an answer is wrong.

  Args:
    trajectories: as a rollout gives them; their `correct` and `score` are set.
    judge: called with those that are wrong by the rule, even if there are none; gives a score for each, or None to keep
      the rule's.  The higher of the two counts.

  Raises:
    ValueError: a task names an unknown rule.
  """
  for traj in trajectories:
    task = traj.task
    try:
      traj.score = float(rule(task.match)(traj.answer, task.answers, task.options))
    except ValueError as e:
      raise ValueError(f"task {task.uid}: {e}") from e
  wrong = [traj for traj in trajectories if traj.score < RIGHT]
  for traj, score in zip(wrong, judge(wrong) if judge else ()):
    traj.score = max(traj.score, score or 0.0)
  for traj in trajectories:
    traj.correct = traj.score >= RIGHT
