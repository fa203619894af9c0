"""Every knob once, with its unit and where its default comes from.

Labels: [published] ViRL, arXiv 2511.23031; [ours] chosen here; [NAME] that project's value.
The paper's own learning rate, batch, group size, KL, clip, lam, rho and modulators are not
published in what we have, so every default for them is ours or a named peer's.
"""

from __future__ import annotations

import json

import ml_collections

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
  n.families = ("pattern", "pair_pattern")  # see data/sources/needle.py
  n.objects = (2, 4)               # fewest and most objects in a picture [ours]
  n.side_px = 252                  # side of the square picture [ours]
  n.train_size = 2048              # pictures in the train split [ours]
  n.test_size = 512                # pictures in the test split [ours]
  n.seed = 0                       # draws the pictures; independent of c.seed

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
  r.mask_overlong = False          # drop trajectories that ran out of tokens from the loss
  r.pad_tokens = 64                # token buckets are multiples of this [ours]
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
  w.lam = 0.5                      # weight of progressive refinement [ours]
  w.rho = 0.5                      # redundancy penalty [ours]
  w.w_answer = 1.0                 # [ours]
  w.w_format = 0.2                 # [DeepEyes]
  w.w_fidelity = 1.0               # [ours]
  w.no_action = -1.0               # fidelity of a trajectory that never zooms where it should [ours]

  c.credit = k = ConfigDict()
  k.h_good = 1.5                   # amplifies: correct if A > 0, erroneous if A < 0 [ours]
  k.h_redundant = 0.75             # attenuates the redundant if A > 0; 2 - h_redundant if A < 0 [ours]
  k.h_bad = 0.5                    # attenuates: erroneous if A > 0, correct if A < 0 [ours]

  c.advantage = a = ConfigDict()
  a.normalize_std = True           # divide by the group's standard deviation [GRPO]

  c.loss = o = ConfigDict()
  o.clip_low = 0.2                 # [PPO]
  o.clip_high = 0.28               # [DAPO; DeepEyes uses 0.28-0.35]
  o.kl_coef = 0.0                  # k3 estimate against the frozen reference [DeepEyes]
  o.entropy_coef = 0.0             # bonus; entropy is always a metric [ours]

  c.ppo = q = ConfigDict()
  q.minibatches = 1                # updates a rollout batch is split into, whole groups each [ours]
  q.epochs = 1                     # passes over a rollout batch [ours]

  c.optim = t = ConfigDict()
  t.learning_rate = 1e-6           # peak [DeepEyes, Pixel-Reasoner]
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
  for key in ("max_images", "max_vision_tokens", "top_k", "slots"):
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
  need(c.rollout.group_size > 1 or not c.advantage.normalize_std, "rollout.group_size",
       "at least 2 for a group-relative advantage with normalize_std", c.rollout.group_size)
  for low, high in (("min_pixels", "max_pixels"), ("crop_min_pixels", "crop_max_pixels")):
    need(28 * 28 <= c.image[low] <= c.image[high], f"image.{low}",
         f"at least 784 and at most image.{high} = {c.image[high]}", c.image[low])
  for key in ("dtype", "compute_dtype"):
    need(c.model[key] in ("float32", "bfloat16"), f"model.{key}", "'float32' or 'bfloat16'", c.model[key])
  for key in ("window", "past", "explosion_ratio"):
    need(c.monitor[key] >= 1, f"monitor.{key}", "at least 1", c.monitor[key])
  for key in ("collapse_acc_ans", "explosion_acc_drop", "superficial_acc_rat", "entropy_share"):
    need(0 <= c.monitor[key] <= 1, f"monitor.{key}", "between 0 and 1", c.monitor[key])
  for key in ("collapse_zooms", "explosion_zooms", "superficial_zooms", "hacking_log2", "hacking_growth",
              "hacking_fidelity_rise", "entropy_nats", "drift_mean_nats", "drift_max_nats"):
    need(c.monitor[key] >= 0, f"monitor.{key}", "0 or more", c.monitor[key])
  need(set(c.monitor.stop) <= set(MONITORS), "monitor.stop", f"names out of {MONITORS}", c.monitor.stop)


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
