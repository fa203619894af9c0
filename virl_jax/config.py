"""Every knob once, with its unit and where its default comes from.

Labels: [published] ViRL, arXiv 2511.23031; [ours] chosen here; [NAME] that project's value.
The paper's own learning rate, batch, group size, KL, clip, lam, rho and modulators are not
published in what we have, so every default for them is ours or a named peer's.
"""

from __future__ import annotations

import json

import ml_collections

from virl_jax.rl import advantage
from virl_jax.rl import credit
from virl_jax.rl import loss
from virl_jax.rl import reward

ConfigDict = ml_collections.ConfigDict

# The monitors of `eval/monitors.py` by name; a test compares the two.
MONITORS = ("visual_thinking_collapse", "invocation_explosion", "superficial_grounding", "box_size_hacking",
            "entropy_collapse", "sampler_drift")


def default() -> ConfigDict:
  """The configuration that `configs/*.py` start from and override."""
  c = ConfigDict()
  c.seed = 0                       # seeds parameters, data order and sampling
  c.steps = 100                    # rollout-and-update iterations

  c.model = m = ConfigDict()
  m.path = ""                      # HF folder; "@tiny" is the base that ships with the package
  m.dtype = "float32"              # parameter dtype: float32 | bfloat16
  m.compute_dtype = "float32"      # matmul dtype: float32 | bfloat16
  m.remat = False                  # recompute layers in the backward pass

  c.data = d = ConfigDict()
  d.source = "needle"              # needle | jsonl
  d.path = ""                      # jsonl: the records file; needle: cache folder ("" = user cache)
  d.eval_fraction = 0.2            # jsonl: share of records held out for evaluation [ours]
  d.needle = n = ConfigDict()
  n.families = ("pattern", "pair_pattern")  # see tiny/needle.py
  n.objects = (2, 4)               # fewest and most objects in a picture [ours]
  n.side_px = 252                  # side of the square picture [ours]
  n.train_size = 2048              # pictures in the train split [ours]
  n.test_size = 512                # pictures in the test split [ours]
  n.seed = 0                       # draws the pictures; independent of c.seed
  n.guessable = 0.0                # share of train pictures that can be answered without a zoom [ours]

  c.image = i = ConfigDict()
  i.min_pixels = 3136              # shown image, after resizing [Qwen2.5-VL]
  i.max_pixels = 1003520           # shown image, after resizing [transformers' class default]
  i.crop_min_pixels = 3136         # crops, after resizing [Qwen2.5-VL]
  i.crop_max_pixels = 1003520      # crops, after resizing [ours]
  i.crop_min_side_px = 8           # smaller boxes are refused, in original pixels [ours]
  i.crop_max_aspect = 100.0        # longer boxes are refused [DeepEyes]
  i.crop_expand = False            # cut a larger region for such boxes instead of refusing them [ours]
  i.decode_max_pixels = 178956970  # larger files are skipped as decompression bombs [Pillow]

  c.prompt = p = ConfigDict()
  p.system = "You are a helpful assistant."  # [Qwen2.5-VL]
  p.describe_tool = True           # put the tool's JSON schema into the system turn [Hermes]
  p.image_first = True             # image before the question [Qwen2.5-VL]
  p.instruction = ""               # appended to every question
  p.zoom_into_crops = False        # a call may name an earlier crop, by target_image [Pixel-Reasoner]
  p.last_notice = "No further zoom is possible. Answer now."  # told with the last crop; "" for nothing [ours]

  c.rollout = r = ConfigDict()
  r.prompts = 16                   # prompts a step [ours]
  r.group_size = 8                 # rollouts of one prompt, G [DeepEyes, Mini-o3: 8-16]
  r.max_rounds = 6                 # visual actions a trajectory [published]
  r.max_turn_tokens = 1024         # tokens sampled in one turn [ours]
  r.max_total_tokens = 16384       # tokens of a whole trajectory, prompt included [ours]
  r.temperature = 1.0              # [DeepEyes, Pixel-Reasoner, Mini-o3]
  r.resample = 0                   # further batches of prompts to replace groups with equal rewards [DAPO]
  r.mask_overlong = False          # drop trajectories that ran out of tokens from the loss
  r.pad_tokens = 64                # token buckets are multiples of this [ours]
  r.join_rows = False              # the learner puts short trajectories into one row (sequence packing); not for
                                   #   GPUs: cuDNN's attention can't keep them apart, and is not used then [ours]
  r.max_images = 0                 # images a trajectory, the shown one too; 0 for no limit
  r.max_vision_tokens = 0          # vision tokens a trajectory; 0 for no limit
  r.top_k = 0                      # sample from the k likeliest tokens; 0 for all. PPO's loss knows of no cut:
  r.top_p = 1.0                    #   these three bias it, and are for evaluation [DeepEyes, Mini-o3: none]
  r.min_p = 0.0                    # tokens at least this share as likely as the likeliest; 0 for all
  r.stop_strings = ()              # text that ends a turn, such as ("</tool_call>", "</answer>")
  r.slots = 0                      # decode slots on all devices; 0 for as many as trajectories
  r.segment_tokens = 32            # tokens decoded before the host looks at who has ended [ours]
  r.serve_share = 0.125            # a segment ends early when this share of the slots has [ours]
  r.decode_ratio = 4.0             # programs are compiled for all slots, and for ever fewer by this ratio [ours]
  r.append_ratio = 4.0             # the same for rows that get a crop or a prompt [ours]
  r.token_steps = 1                # buckets of a tool turn's tokens for each power of two [ours]
  r.threads = 2                    # host threads that parse, crop and patchify [ours]

  c.reward = w = ConfigDict()
  w.h0 = 0.4                       # IoU that makes a visual action correct [ours, within the published sweep 0.2-0.5]
  w.h0_start = 0.2                 # where a linear schedule of h0 begins [ours]
  w.h0_steps = 0                   # steps until it arrives at h0; 0 for a constant h0 [ours]
  w.mode = "iou"                   # boxes are scored by: iou | giou | coverage | tightness | centre [published: iou]
  w.w_sign = 1.0                   # weight of signed correctness [ours]
  w.lam = 0.5                      # weight of progressive refinement [ours]
  w.rho = 0.5                      # redundancy penalty [ours]
  w.average = "mean"               # of the actions' rewards: mean | sum | discounted | best [published: mean]
  w.discount = 0.9                 # of each further action, if discounted [ours]
  w.w_cover = 0.0                  # weight of the share of a task's boxes that were hit [ours]
  w.w_answer = 1.0                 # [ours]
  w.w_format = 0.2                 # [DeepEyes]
  w.w_fidelity = 1.0               # [ours]
  w.no_action = -1.0               # fidelity of a trajectory that never zooms where it should [ours]

  c.credit = k = ConfigDict()
  k.kind = "hard"                  # hard | soft | additive | none; see rl/credit.py [ours]
  k.scope = "turn"                 # tokens of an action: its turn, reasoning and all | call | box [ours]
  k.h_good = 1.5                   # amplifies: correct if A > 0, erroneous if A < 0 [ours]
  k.h_redundant = 0.75             # attenuates the redundant if A > 0; 2 - h_redundant if A < 0 [ours]
  k.h_bad = 0.5                    # attenuates: erroneous if A > 0, correct if A < 0 [ours]

  k.softness = 0.1                 # width of the sigmoid around h0, if soft [ours]
  k.mirror = True                  # blame mirrors praise: a bad trajectory blames its bad zooms most [published]
  k.step_weight = 0.5              # weight of the actions' own advantages, if additive [ours]
  k.keep_scale = False             # keep the batch's mean absolute advantage as it was before [ours]

  c.advantage = a = ConfigDict()
  a.kind = "group"                 # group (GRPO) | rloo | batch (REINFORCE++) | gae (with a critic)
  a.normalize_std = True           # group: divide by the group's standard deviation [GRPO]; False is Dr. GRPO
  a.gamma, a.lam = 1.0, 0.95       # gae: discount a token, and lambda [PPO for language: verl]
  a.drop_equal = False             # leave groups whose rewards are all equal out of the loss's means [DAPO]

  c.loss = o = ConfigDict()
  o.kind = "ppo"                   # ppo | gspo | cispo; see rl/loss.py
  o.aggregate = "token"            # token [DAPO] | sequence [GRPO] | constant [Dr. GRPO]
  o.norm_tokens = 1024             # constant: tokens that each trajectory is divided by [ours]
  o.clip_low = 0.2                 # [PPO]
  o.clip_high = 0.28               # [DAPO; DeepEyes uses 0.28-0.35]
  o.dual_clip = 0.0                # most that blame is multiplied by; 0 for no limit [verl: 3]
  o.sampler_cap = 0.0              # truncated importance weights against the sampler; 0 for none [verl: 2]
  o.kl_coef = 0.0                  # weight of the KL against the frozen reference; 0 keeps no reference [DeepEyes]
  o.kl_estimator = "k3"            # k1 | k2 | k3 [GRPO: k3]
  o.kl_in_reward = False           # take it off the reward instead of adding it to the loss
  o.kl_target = 0.0                # nats a token that an adaptive kl_coef aims at; 0 for a constant one
  o.kl_horizon = 10000.0           # trajectories that it takes to get there [arXiv 1909.08593]
  o.entropy_coef = 0.0             # bonus; entropy is always a metric [ours]
  o.value_coef = 0.5               # gae: weight of the critic's loss [PPO]
  o.value_clip = 0.2               # gae: most that a value moves in the loss; 0 for no limit [PPO]

  c.ppo = q = ConfigDict()
  q.minibatches = 1                # updates a rollout batch is split into, whole groups each [ours]
  q.epochs = 1                     # passes over a rollout batch [ours]

  c.optim = t = ConfigDict()
  t.learning_rate = 1e-6           # peak [DeepEyes, Pixel-Reasoner]
  t.critic_learning_rate = 1e-5    # peak of the value head's [verl]
  t.warmup_steps = 0               # updates of linear warm-up [ours]
  t.decay_steps = 0                # updates of linear decay to a tenth after warm-up; 0 is constant [ours]
  t.b1, t.b2, t.eps = 0.9, 0.999, 1e-8  # [AdamW]
  t.weight_decay = 0.0             # [ours]
  t.clip_norm = 1.0                # global gradient norm [DeepEyes]

  c.mesh = h = ConfigDict()
  h.data, h.fsdp, h.tensor = -1, 1, 1  # devices an axis; -1 takes what is left

  c.checkpoint = s = ConfigDict()
  s.every = 50                     # steps
  s.keep = 2                       # newest kept

  c.eval = e = ConfigDict()
  e.tasks = 256                    # held-out tasks, before and after; 0 turns evaluation off
  e.temperature = 1.0              # 0 is greedy
  e.bootstrap = 2000               # resamples for the 95% intervals

  c.warmstart = u = ConfigDict()   # `python -m virl_jax.warmstart`; all [ours]
  u.base = ""                      # HF folder to go on from, in the clumsy stage alone; "" starts from nothing
  u.p_direct = 0.0                 # share of the clumsy stage's demonstrations that answer without a zoom
  u.p_clumsy = 1.0                 # share of the clumsy stage's zooms that are
  u.p_count = 0.0                  # share of the clumsy stage's demonstrations that count all objects with a mark
  u.steps = 2500                   # optimiser updates
  u.pictures = 8000                # different pictures in each stage
  u.marks = ("pattern",)           # kinds of marks, keys of needle.MARKS
  u.learning_rate = 1.2e-3         # peak, until the clumsy stage
  u.clumsy_learning_rate = 3e-4    # peak of the clumsy stage
  u.workers = 2                    # processes that draw
  u.save_every = 100               # updates

  c.log = g = ConfigDict()
  g.gallery = 8                    # trajectories kept for the report each time
  g.gallery_every = 20             # steps between kept rollouts
  g.tensorboard = True             # write scalars where TensorBoard's writer is installed

  c.monitor = v = ConfigDict()     # alarms while training, see docs/monitors.md; all thresholds [ours]
  v.window = 8                     # steps that means and medians are taken over [ours]
  v.past = 16                      # steps before those that count as the recent past [ours]
  v.collapse_acc_ans = 0.5         # visual thinking collapse: share of right answers, at least [ours]
  v.collapse_zooms = 0.1           #   zooms a trajectory, at most [ours]
  v.explosion_ratio = 1.5          # invocation explosion: zooms against the recent past, at least [ours]
  v.explosion_zooms = 0.5          #   more zooms a trajectory, at least [ours]
  v.explosion_acc_drop = 0.1       #   fall of the share of right answers, at least [ours]
  v.superficial_zooms = 2.0        # superficial grounding: zooms a trajectory, at least [ours]
  v.superficial_acc_rat = 0.2      #   share of right zooms, at most [ours]
  v.hacking_log2 = 1.0             # box-size hacking: doublings between areas of box and truth, at least [ours]
  v.hacking_growth = 0.5           #   doublings more than in the first steps, at least [ours]
  v.hacking_fidelity_rise = 0.1    #   fidelity reward above that of the first steps, at least [ours]
  v.entropy_nats = 0.02            # entropy collapse: nats a token, at most [ours]
  v.entropy_share = 0.2            #   or share of the first steps' entropy, at most [ours]
  v.drift_mean_nats = 0.05         # sampler drift: mean gap of log-probabilities, nats, at least [ours]
  v.drift_max_nats = 5.0           #   or largest gap, nats, at least [ours]
  v.stop = ()                      # names of monitors that end the run; () for none [ours]
  return c


def validate(c: ConfigDict) -> None:
  """Refuses values that can't work, before anything slow starts.

  Raises:
    ValueError: names the key, what was wanted and what came.
  """
  def need(ok, key, wanted, got):
    if not ok:
      raise ValueError(f"config.{key} must be {wanted}. Received: {got!r}")

  for key in ("rollout.prompts", "rollout.group_size", "rollout.max_rounds", "rollout.max_turn_tokens",
              "rollout.pad_tokens", "rollout.segment_tokens", "rollout.threads",
              "ppo.minibatches", "ppo.epochs", "checkpoint.every", "checkpoint.keep"):
    section, name = key.split(".")
    need(c[section][name] >= 1, key, "at least 1", c[section][name])
  need(c.steps >= 0, "steps", "0 or more", c.steps)
  need(c.data.source in ("needle", "jsonl"), "data.source", "'needle' or 'jsonl'", c.data.source)
  need(c.data.source != "jsonl" or c.data.path, "data.path",
       "the path of a records file when config.data.source is 'jsonl'", c.data.path)
  need(0.0 < c.data.eval_fraction < 1.0, "data.eval_fraction", "between 0 and 1", c.data.eval_fraction)
  need(0.0 <= c.reward.h0 <= 1.0, "reward.h0", "an IoU in [0, 1]", c.reward.h0)
  need(c.rollout.temperature > 0, "rollout.temperature",
       "positive (PPO needs a distribution to sample from)", c.rollout.temperature)
  need(c.eval.temperature >= 0, "eval.temperature", "0 (greedy) or positive", c.eval.temperature)
  for key in ("max_images", "max_vision_tokens", "top_k", "slots", "resample"):
    need(c.rollout[key] >= 0, f"rollout.{key}", "0 or more", c.rollout[key])
  for key in ("decode_ratio", "append_ratio"):
    need(c.rollout[key] > 1, f"rollout.{key}", "above 1", c.rollout[key])
  need(c.rollout.token_steps in (1, 2, 4), "rollout.token_steps", "1, 2 or 4", c.rollout.token_steps)
  need(c.rollout.max_images != 1, "rollout.max_images", "0 (no limit) or at least 2: the shown image is one", 1)
  need(0 < c.rollout.top_p <= 1, "rollout.top_p", "above 0 and at most 1", c.rollout.top_p)
  for key in ("min_p", "serve_share"):
    need(0 <= c.rollout[key] <= 1, f"rollout.{key}", "between 0 and 1", c.rollout[key])
  need(all(isinstance(s, str) and s for s in c.rollout.stop_strings), "rollout.stop_strings", "non-empty strings",
       c.rollout.stop_strings)
  need(c.rollout.prompts % c.ppo.minibatches == 0, "ppo.minibatches",
       f"a divisor of config.rollout.prompts = {c.rollout.prompts}", c.ppo.minibatches)
  for low, high in (("min_pixels", "max_pixels"), ("crop_min_pixels", "crop_max_pixels")):
    need(28 * 28 <= c.image[low] <= c.image[high], f"image.{low}",
         f"at least 784 and at most image.{high} = {c.image[high]}", c.image[low])
  for key in ("dtype", "compute_dtype"):
    need(c.model[key] in ("float32", "bfloat16"), f"model.{key}", "'float32' or 'bfloat16'", c.model[key])
  need(c.warmstart.steps >= 1, "warmstart.steps", "at least 1", c.warmstart.steps)
  for key in ("p_direct", "p_clumsy", "p_count"):
    need(0 <= c.warmstart[key] <= 1, f"warmstart.{key}", "a share in [0, 1]", c.warmstart[key])
  for key in ("window", "past", "explosion_ratio"):
    need(c.monitor[key] >= 1, f"monitor.{key}", "at least 1", c.monitor[key])
  for key in ("collapse_acc_ans", "explosion_acc_drop", "superficial_acc_rat", "entropy_share"):
    need(0 <= c.monitor[key] <= 1, f"monitor.{key}", "between 0 and 1", c.monitor[key])
  for key in ("collapse_zooms", "explosion_zooms", "superficial_zooms", "hacking_log2", "hacking_growth",
              "hacking_fidelity_rise", "entropy_nats", "drift_mean_nats", "drift_max_nats"):
    need(c.monitor[key] >= 0, f"monitor.{key}", "0 or more", c.monitor[key])
  need(set(c.monitor.stop) <= set(MONITORS), "monitor.stop", f"names out of {MONITORS}", c.monitor.stop)
  _validate_algorithm(c, need)


def _validate_algorithm(c: ConfigDict, need) -> None:
  """Refuses choices that don't exist, and combinations that make no sense, with the reason."""
  choices = {"reward.mode": reward.MODES, "reward.average": reward.AVERAGES, "credit.kind": credit.KINDS,
             "credit.scope": credit.SCOPES, "advantage.kind": advantage.KINDS, "loss.kind": loss.KINDS,
             "loss.aggregate": loss.AGGREGATES, "loss.kl_estimator": loss.ESTIMATORS}
  for key, known in choices.items():
    section, name = key.split(".")
    need(c[section][name] in known, key, f"one of {', '.join(known)}", c[section][name])
  w, k, a, o = c.reward, c.credit, c.advantage, c.loss
  need(0.0 <= w.h0_start <= 1.0, "reward.h0_start", "in [0, 1]", w.h0_start)
  for key in ("reward.h0_steps", "loss.dual_clip", "loss.sampler_cap", "loss.kl_coef", "loss.kl_target",
              "loss.value_clip", "loss.value_coef"):
    section, name = key.split(".")
    need(c[section][name] >= 0, key, "0 or more", c[section][name])
  for key in ("credit.softness", "loss.norm_tokens", "loss.kl_horizon"):
    section, name = key.split(".")
    need(c[section][name] > 0, key, "positive", c[section][name])
  for key in ("gamma", "lam"):
    need(0 <= a[key] <= 1, f"advantage.{key}", "between 0 and 1", a[key])
  need(0 < w.discount <= 1, "reward.discount", "above 0 and at most 1", w.discount)
  need(c.rollout.group_size > 1 or a.kind in ("batch", "gae") or a.kind == "group" and not a.normalize_std,
       "rollout.group_size", f"at least 2 for advantage.kind = {a.kind!r}: one rollout has no siblings",
       c.rollout.group_size)
  need(not (a.kind == "gae" and k.kind == "additive"), "credit.kind",
       "hard, soft or none with advantage.kind = 'gae': its rewards already come in action by action", k.kind)
  need(not (a.kind == "gae" and a.drop_equal), "advantage.drop_equal",
       "False with advantage.kind = 'gae': a critic learns from equal groups too", a.drop_equal)
  need(o.kind == "ppo" or not o.dual_clip, "loss.dual_clip",
       f"0 with loss.kind = {o.kind!r}: only PPO's token ratios have a dual clip", o.dual_clip)
  need(o.kind != "gspo" or o.aggregate == "sequence", "loss.aggregate",
       "'sequence' with loss.kind = 'gspo': its ratio is the sequence's", o.aggregate)
  need(o.kl_coef > 0 or not o.kl_in_reward, "loss.kl_in_reward", "False while loss.kl_coef is 0", o.kl_in_reward)
  need(o.kl_coef > 0 or not o.kl_target, "loss.kl_target",
       "0 while loss.kl_coef is 0: an adaptive coefficient starts from it and multiplies", o.kl_target)
  need(o.kl_estimator != "k1" or o.kl_in_reward or not o.kl_coef, "loss.kl_estimator",
       "k2 or k3 in the loss: k1's gradient has nothing to do with the divergence", o.kl_estimator)
  need(o.dual_clip == 0 or o.dual_clip > 1 + o.clip_high, "loss.dual_clip",
       f"0, or above 1 + clip_high = {1 + o.clip_high}", o.dual_clip)


def to_json(c: ConfigDict) -> str:
  """The configuration as stable, readable JSON, as a workdir keeps it."""
  return json.dumps(json.loads(c.to_json(sort_keys=True)), indent=1, sort_keys=True) + "\n"


def from_json(text: str, where: str = "config.json") -> ConfigDict:
  """The inverse of `to_json`; keys that the text lacks keep their defaults.

  Args:
    text: what a workdir's config.json holds.
    where: named in errors.

  Raises:
    ValueError: if it is no JSON, or has keys or types that no configuration has.
  """
  try:
    found = json.loads(text)
    c = default().lock()
    c.update(_tuples(found))
    return c.unlock()
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise ValueError(f"{where} must be a configuration as a run writes it ({e})") from e


def _tuples(tree):
  """JSON has no tuples; every sequence of a configuration is one."""
  if isinstance(tree, dict):
    return {k: _tuples(v) for k, v in tree.items()}
  return tuple(map(_tuples, tree)) if isinstance(tree, list) else tree
