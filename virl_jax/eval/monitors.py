"""Names what goes wrong in a run while it trains: one pure function a failure, over the lines of metrics.jsonl.

Each looks at means or medians over the last `window` steps, so that one noisy step raises no alarm.  There is no alarm
if the history is too short, or fewer than half of those steps have the numbers.  Alarms are stored nowhere: the same
history gives the same alarms in a run, in a resumed run, and in the report.

Our reading: the paper names visual thinking collapse, invocation explosion and superficial grounding, and gives no
thresholds.  The other three, and every threshold, are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math
import statistics

from virl_jax import checks

History = Sequence[Mapping[str, object]]  # lines of metrics.jsonl, oldest first


@dataclasses.dataclass(frozen=True)
class Config:
  """Thresholds; see `config.default().monitor` for where they come from.

  Attributes:
    window: steps that means and medians are taken over, 1 or more.
    past: steps before the window that count as the recent past, 1 or more.
    collapse_acc_ans: visual thinking collapse: share of right answers, at least;
    collapse_zooms: and zooms a trajectory, at most.
    explosion_ratio: invocation explosion: zooms, as a multiple of the recent past's, at least;
    explosion_zooms: and rise in zooms a trajectory, at least;
    explosion_acc_drop: and fall in the share of right answers, at least.
    superficial_zooms: superficial grounding: zooms a trajectory, at least;
    superficial_acc_rat: and share of right zooms, at most.
    hacking_log2: box-size hacking: doublings between the area of a box and that of the truth, either way, at least;
    hacking_growth: and rise in these doublings since the run's first steps, at least;
    hacking_fidelity_rise: and rise in the fidelity reward since then, at least.
    entropy_nats: entropy collapse: entropy, at most;
    entropy_share: or entropy as a share of the run's first, at most.
    drift_mean_nats: sampler drift: mean gap between the sampler's and the trainer's log-probabilities, at least;
    drift_max_nats: or largest such gap, at least.
    stop: names of the monitors that end the run.
  """

  window: int = 8
  past: int = 16
  collapse_acc_ans: float = 0.5
  collapse_zooms: float = 0.1
  explosion_ratio: float = 1.5
  explosion_zooms: float = 0.5
  explosion_acc_drop: float = 0.1
  superficial_zooms: float = 2.0
  superficial_acc_rat: float = 0.2
  hacking_log2: float = 1.0
  hacking_growth: float = 0.5
  hacking_fidelity_rise: float = 0.1
  entropy_nats: float = 0.02
  entropy_share: float = 0.2
  drift_mean_nats: float = 0.05
  drift_max_nats: float = 5.0
  stop: tuple[str, ...] = ()

  def __post_init__(self):
    steps, share, some = checks.whole(1), checks.real(0, 1), checks.real(0)
    checks.section(vars(self), "monitor", window=steps, past=steps, collapse_acc_ans=share, collapse_zooms=some,
                   explosion_ratio=checks.real(1), explosion_zooms=some, explosion_acc_drop=share,
                   superficial_zooms=some, superficial_acc_rat=share, hacking_log2=some, hacking_growth=some,
                   hacking_fidelity_rise=some, entropy_nats=some, entropy_share=share, drift_mean_nats=some,
                   drift_max_nats=some, stop=checks.some_of([monitor.__name__ for monitor in MONITORS]))


@dataclasses.dataclass(frozen=True)
class Alarm:
  """A failure that a history shows.

  Attributes:
    name: of the monitor.
    step: the last step of the history, as in its line, counted from 0.
    message: one sentence with the numbers and what to do next.
  """

  name: str
  step: int
  message: str


def visual_thinking_collapse(history: History, cfg: Config) -> Alarm | None:
  """Answers are right, almost without zooms.

  Args:
    history: the lines so far.
    cfg: the thresholds.

  Returns:
    The alarm that the last step gives, or None.

  Source: ViRL (arXiv 2511.23031) names it; the thresholds are ours.
  """
  now = _means(_last(history, cfg), "acc_ans", "rationale_count")
  if now is None or now[0] < cfg.collapse_acc_ans or now[1] > cfg.collapse_zooms:
    return None
  return _alarm("visual_thinking_collapse", history, (
      f"{now[0]:.0%} of the answers are right with {now[1]:.2f} zooms a trajectory (means of {cfg.window} steps), so "
      "the policy answers without looking: lower config.reward.no_action or raise config.reward.w_fidelity, and drop "
      "tasks that can be answered without a zoom"))


def invocation_explosion(history: History, cfg: Config) -> Alarm | None:
  """Zooms multiply, and answers get worse.

  Args:
    history: the lines so far.
    cfg: the thresholds.

  Returns:
    The alarm that the last step gives, or None.

  Source: ViRL (arXiv 2511.23031) names it; the thresholds are ours.
  """
  now, then = (_means(lines, "rationale_count", "acc_ans") for lines in (_last(history, cfg), _past(history, cfg)))
  if now is None or then is None:
    return None
  (zooms, right), (zooms_then, right_then) = now, then
  more = zooms >= cfg.explosion_ratio * zooms_then and zooms - zooms_then >= cfg.explosion_zooms
  if not more or right_then - right < cfg.explosion_acc_drop:
    return None
  return _alarm("invocation_explosion", history, (
      f"zooms a trajectory went from {zooms_then:.2f} to {zooms:.2f} while right answers fell from {right_then:.0%} to "
      f"{right:.0%} (means of {cfg.past} steps and of the {cfg.window} after them), so zooms are made for their own "
      "sake: raise config.reward.rho, lower config.reward.lam or config.rollout.max_rounds"))


def superficial_grounding(history: History, cfg: Config) -> Alarm | None:
  """Many zooms, and few of them where they should be.

  Args:
    history: the lines so far.
    cfg: the thresholds.

  Returns:
    The alarm that the last step gives, or None.

  Source: ViRL (arXiv 2511.23031) names it; the thresholds are ours.
  """
  # A fidelity of exactly 0 comes from tasks without boxes, whose zooms are neither right nor wrong.
  judged = [line for line in _last(history, cfg) if _number(line.get("reward/fidelity")) != 0.0]
  now = _means(judged, "rationale_count", "acc_rat", of=cfg.window)
  if now is None or now[0] < cfg.superficial_zooms or now[1] > cfg.superficial_acc_rat:
    return None
  return _alarm("superficial_grounding", history, (
      f"{now[0]:.2f} zooms a trajectory and {now[1]:.0%} of them right (means of {cfg.window} steps), so the policy "
      "zooms without finding anything: look at the boxes in the rollouts, check that the data's boxes are pixels of "
      "the original image, and raise config.reward.w_fidelity or lower config.reward.h0"))


def box_size_hacking(history: History, cfg: Config) -> Alarm | None:
  """Boxes become far smaller or larger than the truth, and are rewarded more than before.

  Args:
    history: the lines so far.
    cfg: the thresholds.

  Returns:
    The alarm that the last step gives, or None.

  Source: ours.
  """
  now, then = (_means(lines, "box/log_area_ratio", "reward/fidelity")
               for lines in (_last(history, cfg), _first(history, cfg)))
  if now is None or then is None:
    return None
  (size, reward), (size_then, reward_then) = now, then
  off = abs(size) >= cfg.hacking_log2 and abs(size) - abs(size_then) >= cfg.hacking_growth
  if not off or reward - reward_then < cfg.hacking_fidelity_rise:
    return None
  return _alarm("box_size_hacking", history, (
      f"boxes have {_times(size)} the area of the truth, {_times(size_then)} at first, while the fidelity "
      f"reward rose from {reward_then:+.2f} to {reward:+.2f} (means of {cfg.window} steps), so box size is what pays: "
      "look at the boxes in the rollouts, and raise config.reward.h0, which bounds the ratio"))


def entropy_collapse(history: History, cfg: Config) -> Alarm | None:
  """The policy has almost no entropy left.

  Args:
    history: the lines so far.
    cfg: the thresholds.

  Returns:
    The alarm that the last step gives, or None.

  Source: ours.
  """
  now, then = (_means(lines, "loss/entropy") for lines in (_last(history, cfg), _first(history, cfg)))
  if now is None:
    return None
  low = now[0] <= cfg.entropy_nats
  if not low and (then is None or now[0] > cfg.entropy_share * then[0]):
    return None
  against = "" if then is None else f", {then[0]:.2g} at first"
  return _alarm("entropy_collapse", history, (
      f"entropy is {now[0]:.2g} nats a token{against} (means of {cfg.window} steps), so a prompt's rollouts are all "
      "alike and teach nothing: lower config.optim.learning_rate, or raise config.loss.entropy_coef or "
      "config.loss.clip_high"))


def sampler_drift(history: History, cfg: Config) -> Alarm | None:
  """Sampler and trainer give the same tokens different probabilities.

  Medians, not means: one token that is off by 40 nats once would hold a mean up for a whole window.

  Args:
    history: the lines so far.
    cfg: the thresholds.

  Returns:
    The alarm that the last step gives, or None.

  Source: ours.
  """
  last = _last(history, cfg)
  for key, limit in (("rollout/logp_gap_mean", cfg.drift_mean_nats), ("rollout/logp_gap_max", cfg.drift_max_nats)):
    gap = _means(last, key, average=statistics.median)
    if gap is not None and gap[0] >= limit:
      return _alarm("sampler_drift", history, (
          f"{key} is {gap[0]:.2g} nats (median of {cfg.window} steps, {limit:g} are allowed), so the loss is not about "
          "the policy that sampled: run a few steps with config.model.compute_dtype=float32; if the gap goes, it was "
          "rounding, and if it stays, the sampler computes something else than the trainer"))
  return None


MONITORS = (visual_thinking_collapse, invocation_explosion, superficial_grounding, box_size_hacking, entropy_collapse,
            sampler_drift)


def check(history: History, cfg: Config) -> list[Alarm]:
  """Every alarm that the last step of a history gives.

  Args:
    history: lines of metrics.jsonl, oldest first; values that are missing, None or not finite are left out.
    cfg: the thresholds.

  Source: ours.
  """
  return [alarm for monitor in MONITORS if (alarm := monitor(history, cfg)) is not None]


def begun(history: History, cfg: Config) -> list[Alarm]:
  """The alarms of the last step that the step before did not give.

  Args:
    history: lines of metrics.jsonl, oldest first.
    cfg: the thresholds.

  Source: ours.
  """
  alarms = check(history, cfg)
  before = {alarm.name for alarm in check(history[:-1], cfg)} if alarms else ()
  return [alarm for alarm in alarms if alarm.name not in before]


def all_begun(history: History, cfg: Config) -> list[Alarm]:
  """Every alarm of a run, at the step where it begins, in order; one that ends and begins again is listed again.

  Args:
    history: lines of metrics.jsonl, oldest first.
    cfg: the thresholds.

  Source: ours.
  """
  return [alarm for end in range(1, len(history) + 1) for alarm in begun(history[:end], cfg)]


def stopping(alarms: Sequence[Alarm], cfg: Config) -> Alarm | None:
  """The first alarm that ends the run, if there is one.

  Args:
    alarms: those that have begun so far.
    cfg: of which only `stop` is used.

  Source: ours.
  """
  return next((alarm for alarm in alarms if alarm.name in cfg.stop), None)


def _last(history, cfg):
  return history[-cfg.window:] if len(history) >= cfg.window else ()


def _past(history, cfg):
  """The recent past, which ends where the last steps begin."""
  return history[-cfg.window - cfg.past:-cfg.window] if len(history) >= cfg.window + cfg.past else ()


def _first(history, cfg):
  """The run's first steps, if they are not among the last."""
  return history[:cfg.window] if len(history) >= 2 * cfg.window else ()


def _means(lines, *keys, of=None, average=statistics.fmean):
  """Each key's average over the lines that have all keys; None if fewer than half of `of` (default: all) have them."""
  rows = [[_number(line.get(key)) for key in keys] for line in lines]
  rows = [row for row in rows if None not in row]
  if not rows or 2 * len(rows) < (of or len(lines)):
    return None
  return tuple(average(column) for column in zip(*rows))


def _number(value):
  good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
  return float(value) if good else None


def _times(doublings):
  return f"{2 ** max(-99.0, min(99.0, doublings)):.2g} times"


def _alarm(name, history, message):
  step = history[-1].get("step")
  return Alarm(name, step if isinstance(step, int) else len(history) - 1, message)
