"""From the workdirs of benchmarks/reproduce.py to tables, curves, and what they say about the paper's claims.

Every figure is over held-out tasks after training, all seeds together.  Its 95% interval is a bootstrap over
seeds and, within them, over tasks (the same for all seeds); a difference of two arms draws the same seeds and
tasks for both.  With three seeds, the interval says little about how seeds differ, so each seed's own value is
given beside it.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import warnings

import numpy as np

from virl_jax.eval import harness
from virl_jax.eval import monitors
from virl_jax.eval import outcome
from virl_jax.run import log

H0 = 0.4             # for every figure here, whatever the arm was trained with
BOOTSTRAP = 4000
SHOWN = ("acc_ans", "acc_rat", "rationale_count", "hit_rate", "mean_iou")


@dataclasses.dataclass(frozen=True)
class Section:
  """Arms that are compared.

  Attributes:
    title: of the section.
    arms: their names; all are compared with `full` if it is among them, or else with the first.
    note: text below the title.
    wanted: how many zooms its tasks need, in words; if given, the page says how many were used.
  """

  title: str
  arms: tuple[str, ...]
  note: str = ""
  wanted: str = ""


@dataclasses.dataclass(frozen=True)
class Page:
  """A page of results."""

  title: str
  sections: tuple[Section, ...]


PAGES = {
    "results": Page("Results: the paper's claims on the tiny run", (
        Section("The method, and what is left of it", ("full", "fidelity", "outcome_only")),
        Section("The threshold h0 (full has 0.4)", ("h0_0.2", "h0_0.3", "full", "h0_0.5")),
        Section("The modulators h_good and h_bad (full has 1.5 and 0.5)",
                ("h_1.25_0.75", "full", "h_1.5_0.0", "h_2.0_0.5", "h_2.0_0.0")),
        Section("The redundancy penalty rho (full has 0.5)", ("rho_0.0", "full", "rho_1.0")),
        Section(
            "From a base that at times answers without looking: pictures that want a zoom, or three in four guessable",
            ("filtered_full", "guessable_full", "filtered_outcome_only", "guessable_outcome_only",
             "guessable_shipped_base"),
            "The base of these arms is the shipped one after 200 more steps of imitation. In these, three "
            "demonstrations in ten answer without a zoom, by guessing from colours (`BASES` in "
            "configs/ablations/arms.py), which is right on guessable pictures. `guessable_shipped_base` is "
            "outcome-only training on the same pictures from the shipped base, which never answers without a zoom: "
            "what is never sampled can't be reinforced. The other four arms, and the claims about them, were added "
            "after one seed of `guessable_shipped_base` had shown no collapse."),
        Section("Eight rounds instead of three, and what is made of their rewards",
                ("long_mean", "long_sum", "long_discounted", "long_best"),
                "These tasks never need more than two zooms; [another page](results_rounds.md) has tasks that do.",
                "one or two"))),
    "results_rounds": Page("Tasks that need more than six zooms", (
        Section("Nine rounds, and what is made of their rewards",
                ("count_mean", "count_sum", "count_discounted", "count_best", "count_outcome_only"),
                "How many of seven or eight objects carry a pattern? Each object needs a zoom, and each is a target of "
                "the fidelity reward. The base is the shipped one after 500 more steps of imitating a demonstrator "
                "that counts, colour by colour (`BASES` in configs/ablations/arms.py). It names the colours in turn, "
                "reads marks and adds up. But it has not learned to find an object by a colour that it named itself: "
                "it zooms on objects in no particular order, some twice and some never, so its sums are often wrong. "
                "Training is 25 steps of 64 trajectories. The claims were written before these runs, but after trial "
                "runs of one seed from three bases. Two of these bases were so poor that guessing paid better than "
                "looking, and trajectories became short whatever was rewarded.",
                "seven or eight"),)),
    "results_curation": Page("Training on a set as it was built, and on what curation leaves of it", (
        Section("All of it, and what is left",
                ("unfiltered", "curated", "unfiltered_outcome_only", "curated_outcome_only"),
                "The sets are made by `benchmarks/unfiltered.py`, through `curate build` and `curate` with the arms' "
                "own base as its policy, which answers three in ten without looking (`BASES` in "
                "configs/ablations/arms.py). Of twenty tasks that are built nine can be answered without a "
                "zoom, two have a wrong answer, one has a box that is most of the picture, one is there twice. All "
                "arms take as many steps, and are asked the same other tasks, all of which want a zoom."),)),
    "results_lora": Page("Adapters in place of the weights", (
        Section("All weights, and adapters beside them", ("full", "lora"),
                "The adapters have rank 16 and are on all matrices that `lora.targets` names, in PEFT's terms, "
                "including the vision tower's MLPs; the rest of the model is frozen. Their learning rate is five times "
                "that of the weights; it was the first one tried, on seed 0."),)),
}
SECTIONS = tuple(section for page in PAGES.values() for section in page.sections)


@dataclasses.dataclass(frozen=True)
class Claim:
  """A claim that was published: the metric of arm `more` minus that of arm `less` is above `margin`."""

  text: str
  metric: str
  more: str
  less: str
  margin: float = 0.0


CLAIMS = (
    Claim("ViRL's zooms are right more often than those of outcome-only training (87.3 against 78.2: 9 points)",
          "acc_rat", "full", "outcome_only", 0.09),
    Claim("and its answers are right more often (90.4 against 87.6)", "acc_ans", "full", "outcome_only"),
    Claim("Credit to single actions adds to the fidelity reward, in zooms", "acc_rat", "full", "fidelity"),
    Claim("and in answers", "acc_ans", "full", "fidelity"),
    Claim("h0 = 0.2 rewards weak alignment: zooms get worse", "mean_iou", "full", "h0_0.2"),
    Claim("h0 = 0.5 punishes exploration: fewer tasks are ever hit", "hit_rate", "full", "h0_0.5"),
    Claim("Outcome-only training on guessable data stops zooming", "rationale_count", "filtered_outcome_only",
          "guessable_outcome_only"),
    Claim("and the fidelity reward prevents it", "rationale_count", "guessable_full", "guessable_outcome_only"),
    Claim("On tasks of seven or eight zooms, too, zooms are right more often than those of outcome-only training",
          "acc_rat", "count_mean", "count_outcome_only"),
    Claim("and so are answers", "acc_ans", "count_mean", "count_outcome_only"),
)


@dataclasses.dataclass(frozen=True)
class Arm:
  """The results of an arm.

  Attributes:
    terms: float64[2, S, N, K], numerators and denominators of `outcome.METRICS` by seed and task.
    before: the same for its base.
    curves: for each seed, the lines of its metrics.jsonl.
    uids: of the tasks, in order, by seed: arms are compared task by task.
  """

  terms: np.ndarray
  before: np.ndarray
  curves: tuple[list[dict], ...]
  uids: tuple[tuple[str, ...], ...] = ()


def _outcomes(folder: pathlib.Path, when: str) -> list[outcome.Outcome]:
  found = harness.outcomes(json.loads((folder / f"eval_{when}.json").read_text()))
  return sorted(found, key=lambda o: o.uid)


def _terms(folders: list[pathlib.Path], when: str) -> np.ndarray:
  return np.stack([outcome.terms(_outcomes(f, when), H0) for f in folders], 1)


def read(out: pathlib.Path, arms: tuple[str, ...], seeds: int) -> dict[str, Arm]:
  """The arms whose runs have all come to their end, by name."""
  found = {}
  for arm in arms:
    folders = [out / arm / f"seed_{s}" for s in range(seeds)]
    if not all((f / "eval_after.json").exists() for f in folders):
      continue
    found[arm] = Arm(_terms(folders, "after"), _terms(folders, "before"),
                     tuple(log.read(str(f / "metrics.jsonl")) for f in folders),
                     tuple(tuple(o.uid for o in _outcomes(f, "after")) for f in folders))
  return found


def sections(found: dict[str, Arm]) -> dict[Section, tuple[str, ...]]:
  """The sections of `SECTIONS` that have something to compare, and their arms that were found."""
  there = {section: tuple(n for n in section.arms if n in found) for section in SECTIONS}
  return {section: names for section, names in there.items() if len(names) > 1}


def _ratio(terms):
  with np.errstate(invalid="ignore", divide="ignore"):
    return terms[0] / terms[1]


def _draws(terms, seed: int = 0) -> np.ndarray:
  """[BOOTSTRAP, K]: the figures of each resample; the same seeds and tasks for all terms of the same size."""
  _, S, N, K = terms.shape
  rng, samples = np.random.default_rng(seed), []
  for _ in range(BOOTSTRAP):
    seeds = np.bincount(rng.integers(S, size=S), minlength=S)
    tasks = np.bincount(rng.integers(N, size=N), minlength=N)
    samples.append(_ratio(np.einsum("s,n,xsnk->xk", seeds, tasks, terms, optimize=True)))
  return np.array(samples)


def _interval(samples) -> tuple[float, float]:
  kept = samples[np.isfinite(samples)]
  return tuple(np.percentile(kept, (2.5, 97.5)).tolist()) if len(kept) else (float("nan"),) * 2


def _summary(terms, draws) -> dict:
  """{metric: {"value", "low", "high", "seeds": [...]}}."""
  result = {}
  for metric in SHOWN:
    k = outcome.METRICS.index(metric)
    low, high = _interval(draws[:, k])
    result[metric] = {"value": float(_ratio(terms.sum((1, 2)))[k]), "low": low, "high": high,
                      "seeds": _ratio(terms.sum(2))[:, k].tolist()}
  return result


def _difference(result: dict, draws: dict, metric: str, more: str, less: str) -> dict:
  """How far apart two arms are, with the interval over the same seeds and tasks for both."""
  k = outcome.METRICS.index(metric)
  low, high = _interval(draws[more][:, k] - draws[less][:, k])
  return {"value": result[more][metric]["value"] - result[less][metric]["value"], "low": low, "high": high}


def _same_tasks(found: dict[str, Arm], a: str, b: str) -> None:
  if found[a].uids != found[b].uids:
    raise ValueError(f"arms {a} and {b} must be about the same held-out tasks to be compared")


def _differences(found: dict[str, Arm], result: dict, draws: dict, names: tuple[str, ...]) -> dict:
  """A section's arms against one of them, `full` or else the first; only those that began with the same policy."""
  against = "full" if "full" in names else names[0]
  for n in names:
    _same_tasks(found, n, against)
  same = [n for n in names if n != against and np.array_equal(found[n].before, found[against].before, equal_nan=True)]
  return {"against": against, "arms": {
      n: {m: _difference(result, draws, m, n, against) for m in SHOWN} for n in same}}


def apart(found: dict[str, Arm], more: str, less: str) -> dict[str, dict[str, float]]:
  """How far apart two arms are, whatever each began with: {metric: {"value", "low", "high"}}.

  Raises:
    ValueError: the arms were asked different tasks.
  """
  _same_tasks(found, more, less)
  draws = {name: _draws(found[name].terms) for name in (more, less)}
  result = {name: _summary(found[name].terms, draws[name]) for name in draws}
  return {metric: _difference(result, draws, metric, more, less) for metric in SHOWN}


def figures(found: dict[str, Arm]) -> dict:
  """All numbers of the page.

  Args:
    found: what `read` gave.

  Returns:
    {arm: `_summary`}; under "before" the same for the base of each section's first arm; under "differences"
    {section: {"against": arm, "arms": {arm: {metric: {"value", "low", "high"}}}}}; under "claims" the claims, each with
    its difference and verdict.
  """
  draws = {name: _draws(arm.terms) for name, arm in found.items()}
  result = {name: _summary(arm.terms, draws[name]) for name, arm in found.items()}
  result["differences"] = {section.title: _differences(found, result, draws, names)
                           for section, names in sections(found).items()}
  result["before"] = {names[0]: _summary(found[names[0]].before, _draws(found[names[0]].before))
                      for names in sections(found).values()}
  result["claims"] = []
  for claim in CLAIMS:
    if claim.more not in found or claim.less not in found:
      continue
    apart = _difference(result, draws, claim.metric, claim.more, claim.less)
    result["claims"].append(dataclasses.asdict(claim) | apart | {"verdict": verdict(**apart, margin=claim.margin)})
  return result


def verdict(value: float, low: float, high: float, margin: float) -> str:
  """What a difference with its interval says about the claim that it is above the margin."""
  if low > 0 and value >= margin:
    return "seen here"
  return "opposite" if high < 0 else "not seen here"


def alarms(arm: Arm) -> str:
  """The monitors that raised alarms in training, with the number of seeds that they did so in, and the first step."""
  first = [{a.name: a.step for a in reversed(monitors.all_begun(c, monitors.Config()))} for c in arm.curves]
  steps = {m.__name__: [f[m.__name__] for f in first if m.__name__ in f] for m in monitors.MONITORS}
  return ", ".join(f"{n} (seeds {len(s)}/{len(first)}, from step {min(s)})" for n, s in steps.items() if s) or "none"


def beyond(terms: np.ndarray, rounds: int) -> float:
  """Share of the trajectories with more than `rounds` zooms."""
  return float((terms[0, :, :, outcome.METRICS.index("rationale_count")] > rounds).mean())


def _rounds(found: dict[str, Arm], names: tuple[str, ...], wanted: str) -> str:
  """How often rounds beyond a smaller budget were used, in words."""
  shares = lambda terms: [beyond(terms, n) for n in (3, 6)]
  said = lambda terms: "{:.1f} % with more than 3 and {:.1f} % with more than 6".format(
      *(100 * share for share in shares(terms)))
  text = (f"Zooms per trajectory, where the tasks need {wanted}: before, {said(found[names[0]].before)}; after, "
          + "; ".join(f"{n} {said(found[n].terms)}" for n in names) + ".")
  if not any(shares(found[n].terms)[1] for n in names):
    text += " No rounds beyond six are used, so this shows how averaging acts on short trajectories, not on long ones."
  return text


def _cell(figure: dict) -> str:
  show = lambda v: f"{v:.3f}" if np.isfinite(v) else "-"  # without zooms, none is right or wrong
  if not np.isfinite(figure["value"]):
    return "-"
  seeds = " ".join(map(show, figure["seeds"]))
  return f"{show(figure['value'])} [{show(figure['low'])}, {show(figure['high'])}] ({seeds})"


def markdown(page: str, found: dict[str, Arm], every: dict, command: str, minutes: float, jobs: int) -> str:
  """One of `PAGES` as Markdown, from its arms and their `figures`."""
  _, seeds, tasks, _ = next(iter(found.values())).terms.shape if found else (0,) * 4
  lines = [f"# {PAGES[page].title}", "",
           f"    {command}", "",
           f"{len(found)} arms, {seeds} seeds each, {tasks} held-out tasks each; {minutes:.0f} minutes over all calls, "
           f"{jobs} runs at a time. Each arm is the tiny run of configs/tiny.py with only the changes that "
           "configs/ablations/arms.py lists for it; its reward weights were chosen for the full method"
           f"{', the arm `full`' if 'full' in found else ''}. Zooms are judged at an IoU of {H0} throughout. Brackets "
           "hold the 95% interval of the mean (bootstrap over seeds and tasks), parentheses the value of each seed. "
           "Alarms are those of docs/monitors.md, with their default thresholds.", "",
           "The policy has two million parameters, and the pictures are drawn. Such runs can show whether a mechanism "
           "works as described at this scale; they say nothing about the size of its effect at 7B.", ""]
  if every["claims"]:
    lines += ["## The paper's claims", "", "| claim | metric | difference | verdict |", "|---|---|---|---|"]
  for c in every["claims"]:
    wanted = f", {c['margin']:.2f} or more" if c["margin"] else ""
    lines.append(f"| {c['text']} | `{c['metric']}`, {c['more']} - {c['less']}{wanted} | {c['value']:+.3f} "
                 f"[{c['low']:+.3f}, {c['high']:+.3f}] | *{c['verdict']}* |")
  if every["claims"]:
    lines += ["", "*Seen here*: the whole interval is above 0, and the difference is at least as large as claimed. "
              "*Opposite*: the whole interval is below 0. *Not seen here*: anything else.", ""]
  for section, names in sections(found).items():
    lines += [f"## {section.title}", "", *([section.note, ""] if section.note else []),
              "| arm | " + " | ".join(SHOWN) + " | alarms |", "|---" * (len(SHOWN) + 2) + "|"]
    for name, row in {"before": every["before"][names[0]], **{n: every[n] for n in names}}.items():
      lines.append(f"| {name} | " + " | ".join(_cell(row[m]) for m in SHOWN)
                   + f" | {'' if name == 'before' else alarms(found[name])} |")
    lines += ["", _rounds(found, names, section.wanted), ""] if section.wanted else [""]
  return "\n".join(lines + [
      "## Every arm against the first of its section, or against full", "",
      "Differences between arms that began with the same policy, with 95% intervals that draw the same seeds and tasks "
      "for both arms. Green is above 0, red below. With this many intervals some exclude 0 by chance alone: about one "
      "in twenty where there is no difference.", "",
      f"![differences of the arms, with intervals]({page}_differences.png)", "",
      "## While training", "", f"![curves of the arms over training]({page}.png)", ""])


def forest(every: dict, path: pathlib.Path) -> None:
  """Draws the differences of `figures` with their intervals, a line for each arm; those that exclude 0 in colour."""
  import matplotlib
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt
  lines = [(section["against"], name, apart) for section in every["differences"].values()
           for name, apart in section["arms"].items()]
  if not lines:
    return
  shown = ("acc_ans", "acc_rat", "rationale_count")
  figure, axes = plt.subplots(1, len(shown), figsize=(12, 1.5 + 0.34 * len(lines)), sharey=True, layout="constrained")
  for ax, metric in zip(axes, shown):
    for y, (_, _, apart) in enumerate(lines):
      d = apart[metric]
      if np.isfinite([d["value"], d["low"], d["high"]]).all():
        colour = "#1b7f4d" if d["low"] > 0 else "#b3362b" if d["high"] < 0 else "#777777"
        ax.plot([d["low"], d["high"]], [y, y], color=colour, linewidth=2)
        ax.plot(d["value"], y, "o", color=colour, markersize=5)
      else:
        ax.text(0, y, "no zoom to judge", fontsize=7, va="center", color="#777777")
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_title(metric, fontsize=10, loc="left")
    ax.grid(axis="x", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
  axes[0].set_yticks(range(len(lines)), [f"{name} - {against}" for against, name, _ in lines], fontsize=8)
  axes[0].invert_yaxis()
  figure.savefig(path, dpi=110)
  plt.close(figure)


def _smooth(values_SX: np.ndarray, width: int) -> np.ndarray:
  """Means over windows, of the finite numbers in them; NaN if there are none."""
  total = lambda x: np.array([np.convolve(row, np.ones(width), "valid") for row in x])
  with np.errstate(invalid="ignore"):
    return total(np.nan_to_num(values_SX)) / total(np.isfinite(values_SX).astype(float))


def picture(found: dict[str, Arm], path: pathlib.Path) -> None:
  """Draws training curves, a row for each section: means over seeds, smoothed, with the range of the seeds."""
  import matplotlib
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt
  rows = sections(found)
  if not rows:
    return
  # While training, acc_rat is judged at the arm's own h0: arms that differ in it have only the IoU in common.
  shown = {r: ("acc_ans", "mean_iou" if "threshold" in r.title else "acc_rat", "rationale_count") for r in rows}
  figure, axes = plt.subplots(len(rows), 3, figsize=(12, 3 * len(rows)), squeeze=False, layout="constrained")
  for line, (section, names) in zip(axes, rows.items()):
    for ax, metric in zip(line, shown[section]):
      for name in names:
        steps = min(len(c) for c in found[name].curves)
        values = np.array([[l.get(metric, np.nan) for l in c[:steps]] for c in found[name].curves], float)
        if metric in ("acc_rat", "mean_iou"):  # without zooms, none is right or wrong
          values[[[not l.get("rationale_count") for l in c[:steps]] for c in found[name].curves]] = np.nan
        width = max(1, steps // 8)
        smooth = _smooth(values, width)
        x = np.arange(smooth.shape[1]) + width
        with np.errstate(invalid="ignore"), warnings.catch_warnings():
          warnings.simplefilter("ignore", RuntimeWarning)  # a column of no numbers has no mean, and is not drawn
          ax.plot(x, np.nanmean(smooth, 0), label=name, linewidth=1.6)
          ax.fill_between(x, np.nanmin(smooth, 0), np.nanmax(smooth, 0), alpha=0.15)
      ax.set_title(metric if metric != shown[section][0] else f"{section.title}\n{metric}", fontsize=9, loc="left")
      ax.grid(alpha=0.3)
      ax.spines[["top", "right"]].set_visible(False)
    line[-1].legend(fontsize=8, frameon=False)
    for ax in line:
      ax.set_xlabel("step", fontsize=8)
      ax.tick_params(labelsize=8)
  figure.savefig(path, dpi=110)
  plt.close(figure)
