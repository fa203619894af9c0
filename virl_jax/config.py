"""Every knob once, with its unit and where its default comes from; docs/configuration.md is made of these comments.

Labels: [published] ViRL, arXiv 2511.23031; [ours] chosen here; [NAME] that project's value.
The paper's own learning rate, batch, group size, KL, clip, lam, rho and modulators are not
published in what we have, so every default for them is ours or a named peer's.

A default in `free(...)` may be changed at each start of a run: it changes no number of a training step, or, as another
mesh does, only how sums are rounded.  All others belong to the run: a workdir with other values is refused, see
`run/workdir.py`.

Ranges are checked by the frozen configurations that the sections become, see `run/setup.py`.
"""

from __future__ import annotations

import dataclasses
import json

import ml_collections

ConfigDict = ml_collections.ConfigDict

# Old names of knobs, with today's: an older config.json is read by these.
RENAMED = {
    "rollout.slots": ("engine.slots",), "rollout.segment_tokens": ("engine.segment_tokens",),
    "rollout.serve_share": ("engine.serve_share",), "rollout.decode_ratio": ("engine.decode_ratio",),
    "rollout.append_ratio": ("engine.append_ratio",), "rollout.token_steps": ("engine.token_steps",),
    "rollout.threads": ("engine.threads",), "rollout.pad_tokens": ("engine.pad_tokens", "pack.pad_tokens"),
    "rollout.join_rows": ("pack.join_rows",),
    "seed": ("seed", "data.split_seed"),  # it once drew the split, too
    **{f"curate.endpoint.{name}": (f"endpoint.{name}",)
       for name in ("model", "timeout_s", "wait_s", "patience_s", "in_flight")},
}
# Knobs that were taken out, each with the only value that today's code still supports.
REMOVED: dict[str, object] = {}


@dataclasses.dataclass(frozen=True)
class _Free:
  value: object


def free(value) -> _Free:
  """Marks a default whose knob may change between starts of a run."""
  return _Free(value)


def default() -> ConfigDict:
  """The configuration that `configs/*.py` start from and override."""
  return ConfigDict(_bare(_knobs().to_dict()))


def free_keys() -> frozenset[str]:
  """The knobs that may change between starts of a run, dotted."""
  return frozenset(key for key, value in flat(_knobs().to_dict()).items() if isinstance(value, _Free))


def flat(tree: dict, prefix: str = "") -> dict:
  """The leaves of a nested dict, by dotted key."""
  found = {}
  for key, value in tree.items():
    found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
  return found


def _knobs() -> ConfigDict:
  c = ConfigDict()
  c.seed = 0                       # seeds parameters, data order and sampling; 0 to 2^32 - 1
  c.steps = free(100)              # rollout-and-update iterations, in all starts together

  c.model = m = ConfigDict()
  m.path = ""                      # Hugging Face folder; "@tiny" is the base that ships with the package
  m.dtype = "float32"              # parameter dtype: float32 | bfloat16
  m.compute_dtype = "float32"      # matmul dtype: float32 | bfloat16
  m.patches_together = 0           # patches of a device that the vision tower sees at a time; 0 for all of them [ours]
  m.gather_vision = False          # with patches_together: fetch the tower's weights once, not for each part; more
                                   #   memory, less traffic [ours]
  m.freeze_vision = False          # train nothing of the vision tower [ours; peers: either]
  m.remat = False                  # recompute layers in the backward pass instead of keeping them: less memory
  # With remat some values can still be kept, which costs memory and saves time: "attention" (its output), "mlp" (the
  # outputs of its first two products), "qkv" (queries, keys, values).
  m.remat_keep = ()                # names of the values kept on the device; () for none [ours]
  m.remat_offload = ()             # names of the values kept in the host's memory, where links are fast [ours]

  c.lora = a = ConfigDict()        # adapters: small matrices beside frozen weights; see docs/scaling.md
  a.rank = 0                       # rank of the adapters; 0 trains the weights themselves [ours]
  a.alpha = 32.0                   # the adapters' output is multiplied by alpha / rank [ours]
  a.targets = ("q_proj", "k_proj", "v_proj", "o_proj",  # modules that get an adapter [PEFT: all-linear]
               "gate_proj", "up_proj", "down_proj")

  c.data = d = ConfigDict()
  d.source = "needle"              # where tasks come from: needle (drawn pictures) | jsonl | set; see docs/data.md
  d.path = ""                      # jsonl: the records file; set: its folder; needle: cache folder ("" = user cache)
                                   #   several files or sets have commas between them, or are a folder of sets
  d.weights = ()                   # "NAME:WEIGHT" of each set or file: its share of a step; () for by size [ours]
  d.easy_first_epochs = 0          # so many epochs walk from what curation's policy solved often to what it seldom
                                   #   solved; 0 for any order [ours]
  d.easy_first_width = 0.25        # share of a set's tasks that is mixed at a time while they do [ours]
  d.eval_path = ""                 # jsonl, set: held-out tasks of a file or set of their own, and all of data.path is
                                   #   trained on; "" holds out a share of data.path
  d.eval_fraction = 0.2            # jsonl, set: share of records held out for evaluation, without data.eval_path [ours]
  d.split_seed = 0                 # draws the held-out records, and which of them are asked; independent of seed
  d.needle = n = ConfigDict()
  n.families = ("pattern", "pair_pattern")  # kinds of questions; see tiny/needle.py
  n.objects = (2, 4)               # fewest and most objects in a picture [ours]
  n.side_px = 252                  # side of the square picture [ours]
  n.train_size = 2048              # pictures in the train split [ours]
  n.test_size = 512                # pictures in the test split [ours]
  n.seed = 0                       # draws the pictures; independent of seed
  n.guessable = 0.0                # share of train pictures that can be answered without a zoom [ours]

  c.image = i = ConfigDict()
  i.min_pixels = 3136              # least pixels of the shown image, after resizing [Qwen2.5-VL]
  i.max_pixels = 1003520           # most pixels of the shown image, after resizing [transformers' class default]
  i.crop_min_pixels = 3136         # least pixels of a crop, after resizing [Qwen2.5-VL]
  i.crop_max_pixels = 1003520      # most pixels of a crop, after resizing [ours]
  i.crop_min_side_px = 8           # boxes with a shorter side are refused; pixels of the original [ours]
  i.crop_max_aspect = 100.0        # long side / short side; longer boxes are refused [DeepEyes]
  i.crop_expand = False            # cut a larger region for small or thin boxes instead of refusing them [ours]
  i.decode_max_pixels = 178956970  # image files of more pixels are skipped as decompression bombs [Pillow]

  c.prompt = p = ConfigDict()
  p.system = "You are a helpful assistant."  # text of the system turn [Qwen2.5-VL]
  p.describe_tool = True           # put the tool's JSON schema into the system turn [Hermes]
  p.image_first = True             # put the image before the question [Qwen2.5-VL]
  p.instruction = ""               # text appended to every question
  p.zoom_into_crops = False        # a call may name an earlier crop, by target_image [Pixel-Reasoner]
  p.last_notice = "No further zoom is possible. Answer now."  # text that goes with the last crop; "" for none [ours]

  c.rollout = r = ConfigDict()     # what is rolled out, and its budgets
  r.tensor = free(1)               # devices that share one copy of the weights in rollouts [ours]
  r.prompts = 16                   # prompts a step [ours]
  r.group_size = 8                 # rollouts of one prompt, G [DeepEyes, Mini-o3: 8-16]
  r.max_rounds = 6                 # most visual actions in a trajectory [published]
  r.max_turn_tokens = 1024         # most tokens sampled in one turn [ours]
  r.max_total_tokens = 16384       # most tokens of a whole trajectory, prompt included [ours]
  r.max_images = 0                 # most images in a trajectory, the shown one included; 0 for no limit
  r.max_vision_tokens = 0          # most vision tokens in a trajectory; 0 for no limit
  r.temperature = 1.0              # of sampling, and in the loss [DeepEyes, Pixel-Reasoner, Mini-o3]
  # These three narrow what is sampled from. PPO's loss does not account for them, so they bias training: they are
  # for evaluation [DeepEyes, Mini-o3: none].
  r.top_k = 0                      # sample from the k likeliest tokens only; 0 for all
  r.top_p = 1.0                    # sample from the likeliest tokens that together have this probability; 1 for all
  r.min_p = 0.0                    # sample from tokens at least this share as likely as the likeliest; 0 for all
  r.stop_strings = ()              # text that ends a turn, such as ("</tool_call>", "</answer>")
  r.resample = 0                   # most extra batches of prompts drawn to replace uninformative groups [DAPO]
  r.mask_overlong = False          # leave trajectories that ran out of tokens out of the loss
  r.mask_out_of_rounds = False     # the same for those that asked for a zoom when no round was left [Mini-o3: True]

  c.engine = y = ConfigDict()      # how rollouts use the device; see docs/rollout.md
  y.slots = 0                      # rows of the cache, over all devices; trajectories queue for them; 0: one each
  y.segment_tokens = 32            # most tokens decoded before the host checks which turns have ended [ours]
  y.serve_share = 0.125            # it checks sooner once turns have ended in this share of the slots [ours]
  # Programs are compiled for a few sizes, and what lies between is padded to the next: finer sizes pad less and
  # compile more often.
  y.decode_ratio = 4.0             # rows that decode: all slots, or all over this ratio, or over its square [ours]
  y.append_ratio = 4.0             # rows that get a prompt or a crop: the same way [ours]
  y.token_steps = 1                # tokens of a crop's turn: powers of two in 1, 2 or 4 steps each [ours]
  y.pad_tokens = 64                # tokens of a prompt: multiples of this [ours]
  y.threads = free(2)              # host threads that parse turns, crop and cut into patches; or decode files [ours]

  c.pack = l = ConfigDict()        # how the learner pads a minibatch; each size is compiled once
  l.pad_tokens = 64                # tokens of a row: multiples of this, or of four times this with join_rows [ours]
  l.join_rows = False              # several short trajectories share a row (sequence packing): less padding [ours]
  l.crops_share = 0.5              # crops: multiples of this share of the minibatch's trajectories [ours]
  l.joined_share = 0.125           # joined rows: multiples of this share of its trajectories [ours]

  c.learner = k = ConfigDict()     # how an update uses a device's memory; see docs/scaling.md
  k.microbatch_tokens = 0          # tokens of a device in one gradient computation; 0 for the whole minibatch [ours]
  k.row_shown = 4                  # most shown images in a row of a microbatch [ours]
  k.row_crops = 8                  # most crops in a row of a microbatch; at least rollout.max_rounds [ours]
  k.offload = free(())             # what moves to the host's memory between steps: "optimizer", "reference" [ours]

  c.reward = w = ConfigDict()      # what zooms and answers are worth; rl/reward.py, docs/algorithm.md
  w.h0 = 0.4                       # IoU that makes a visual action correct [ours, within the published sweep 0.2-0.5]
  w.h0_start = 0.2                 # where a linear schedule of h0 begins [ours]
  w.h0_steps = 0                   # steps until it arrives at h0; 0 for a constant h0 [ours]
  w.mode = "iou"                   # boxes are scored by: iou | giou | coverage | tightness | centre [published: iou]
  w.w_sign = 1.0                   # weight of signed correctness [ours]
  w.lam = 0.5                      # weight of progressive refinement [ours]
  w.rho = 0.5                      # redundancy penalty [ours]
  w.refine_margin = 0.05           # gain in IoU from which a repeated zoom is a refinement, not redundant [ours]
  w.average = "mean"               # of the actions' rewards: mean | sum | discounted | best [published: mean]
  w.discount = 0.9                 # factor of each further action, if discounted [ours]
  w.w_cover = 0.0                  # weight of the share of a task's boxes that were hit [ours]
  w.w_answer = 1.0                 # weight of a right answer [ours]
  w.w_format = 0.2                 # weight of keeping to the protocol in every turn [DeepEyes]
  w.w_fidelity = 1.0               # weight of the visual actions' rewards [ours]
  w.no_action = -1.0               # fidelity of a trajectory that never zooms where it should [ours]

  c.credit = k = ConfigDict()      # how an advantage is assigned to tokens; see docs/algorithm.md
  k.kind = "hard"                  # by class or by IoU: hard | soft | additive | none; see rl/credit.py [ours]
  k.scope = "turn"                 # tokens of an action: its turn, reasoning and all | call | box [ours]
  k.h_good = 1.5                   # factor of correct actions if A > 0, erroneous if A < 0; at least 1 [ours]
  k.h_redundant = 0.75             # factor of redundant ones if A > 0; 2 - h_redundant if A < 0; 0 to 1 [ours]
  k.h_bad = 0.5                    # factor of erroneous ones if A > 0, correct if A < 0; 0 to 1 [ours]
  k.softness = 0.1                 # width of the sigmoid around h0, in IoU, if soft [ours]
  k.mirror = True                  # if A < 0, erroneous actions get most of the blame; False: the factors of A > 0
                                   #   hold for A < 0 too, and correct ones get it [ours: our reading]
  k.step_weight = 0.5              # weight of the actions' own advantages, if additive [ours]
  k.keep_scale = False             # keep the batch's mean absolute advantage as it was before [ours]

  c.advantage = a = ConfigDict()   # what a rollout's reward is compared with; see docs/algorithm.md
  a.kind = "group"                 # relative to what: group (GRPO) | rloo | batch (REINFORCE++) | gae (with a critic)
  a.normalize_std = True           # group: divide by the group's standard deviation [GRPO]; False is Dr. GRPO
  a.std_floor = 0.005              # smallest divisor in place of the deviation, in units of the reward; 0: none [ours]
  a.gamma = 1.0                    # gae: discount per token [verl]
  a.lam = 1.0                      # gae: lambda, from one step (0) to the whole return (1) [verl]
  # A group is informative if its rollouts differ by more than least_spread in what spread_of names.
  a.spread_of = "total"            # which reward: total | answer | fidelity [DAPO: answer; ours: total]
  a.least_spread = 0.01            # least difference, in units of that reward [ours]
  a.drop_equal = False             # leave uninformative groups out of the loss's means [DAPO]

  c.loss = o = ConfigDict()        # what an update minimises; rl/loss.py, docs/algorithm.md
  o.kind = "ppo"                   # the surrogate: ppo | gspo | cispo
  o.aggregate = "token"            # its mean over a batch: token [DAPO] | sequence [GRPO] | constant [Dr. GRPO]
  o.norm_tokens = 1024             # if constant: each trajectory's sum is divided by so many tokens [ours]
  o.clip_low = 0.2                 # ratios below 1 - clip_low are clipped; 0 to 1 [PPO]
  o.clip_high = 0.28               # ratios above 1 + clip_high are clipped [DAPO; DeepEyes uses 0.28-0.35]
  o.dual_clip = 0.0                # largest ratio that counts where A < 0; above 1, or 0 for no limit [verl: 3]
  o.sampler_cap = 0.0              # largest importance weight of trainer against sampler; 0: no weights [verl: 2]
  o.kl_coef = 0.0                  # weight of the KL against the frozen reference; 0 keeps no reference [DeepEyes]
  o.kl_estimator = "k3"            # in the loss k2 | k3, in the reward k1; k3 is at most 10 nats [GRPO: k3; verl]
  o.kl_in_reward = False           # subtract the KL from each token's reward, not add it to the loss; needs k1
  o.kl_target = 0.0                # nats per token that an adaptive kl_coef aims at; 0 for a constant one
  o.kl_horizon = 10000.0           # trajectories over which an adaptive kl_coef adjusts [arXiv 1909.08593]
  o.entropy_coef = 0.0             # weight of an entropy bonus; 0 for none, entropy is a metric anyway [ours]
  o.value_coef = 0.5               # gae: weight of the critic's loss [PPO]
  o.value_clip = 0.2               # gae: largest change of a value in one update; 0 for no limit [PPO]

  c.ppo = q = ConfigDict()         # updates of a rollout batch
  q.minibatches = 1                # updates a rollout batch is split into, whole groups each [ours]
  q.epochs = 1                     # passes over a rollout batch [ours]

  c.optim = t = ConfigDict()       # the optimizer; learner/optim.py
  t.kind = "adamw"                 # adamw | adafactor (almost no state) | muon (half of adamw's state) [ours]
  t.learning_rate = 1e-6           # peak learning rate [DeepEyes, Pixel-Reasoner]
  t.critic_learning_rate = 1e-5    # peak learning rate of the value head [verl]
  t.warmup_steps = 0               # updates of linear warm-up; 0 for none [ours]
  t.decay_steps = 0                # updates of linear decay to a tenth after warm-up; 0 is constant [ours]
  t.b1 = 0.9                       # adamw: decay of the gradients' running mean [AdamW]
  t.b2 = 0.999                     # adamw: decay of their running mean square [AdamW]
  t.eps = 1e-8                     # adamw: added to the square root in the denominator [AdamW]
  t.first_moment = "param"         # dtype of the mean that AdamW or Muon keep: float32 | bfloat16 | param, which is
                                   #   model.dtype [ours]
  t.weight_decay = 0.0             # share of a weight removed by an update, times the learning rate; 0 for none [ours]
  t.clip_norm = 1.0                # gradients are clipped to this norm; 0 for no clipping [DeepEyes]
  # An update whose loss or gradient is not finite is skipped, always; see docs/monitors.md.
  t.stop_after = free(3)           # steps in a row with such updates that end the run; 0 never ends it [ours]
  t.skip_above = 0.0               # skip updates whose gradient norm is above so many medians; 0 for none [ours]
  t.skip_window = 64               # steps that the median is over; it needs at least half as many [ours]

  c.mesh = h = ConfigDict()        # devices along each axis; one of them may be -1: all that are left
  h.data = free(-1)                # batches are split over these
  h.fsdp = free(1)                 # batches and parameters are split over these
  h.tensor = free(1)               # heads and widths are split over these

  c.checkpoint = s = ConfigDict()  # what is saved, and when
  s.every = free(50)               # steps between checkpoints; 0 for the last alone, which is always saved
  s.keep = free(2)                 # newest checkpoints kept
  s.best = free("")                # a metric of metrics.jsonl, such as acc_rat or -loss/total: the checkpoint where its
                                   #   mean since the one before was best is kept as well; "" for none [ours]

  c.eval = e = ConfigDict()        # the evaluations before and after a run
  e.tasks = 256                    # held-out tasks, before and after; 0 turns evaluation off
  e.temperature = 1.0              # of sampling; 0 is greedy
  e.bootstrap = free(2000)         # resamples for the 95% intervals

  c.judge = j = ConfigDict()       # a language model that is asked, in a run's steps and evaluations, whether answers
                                   #   that no rule takes for right mean what a reference says; see docs/data.md
  j.model = ""                     # as its endpoint names it; "" for no judge [ours]
  j.url = free("")                 # of an OpenAI-compatible endpoint, http://HOST:PORT/v1 [ours]
  j.rules = ("exact",)             # tasks without options whose answers it is asked about: their rules [ours]
  j.timeout_s = free(60.0)         # for a verdict [ours]
  j.patience_s = free(3600.0)      # without any reply, until the run ends [ours]
  j.in_flight = free(32)           # questions at a time [ours]

  c.curate = u = ConfigDict()      # `python -m virl_jax.curate`, from built sets to tasks that need looking; see
                                   #   docs/curation.md. The paper's own thresholds are not published: all [ours]
  u.shard_tasks = free(256)        # tasks that are asked, and written down, together
  u.benchmarks = free(())          # "NAME=PATH" or "NAME=PATH=IMAGES": no task may be on a picture of these
  u.rules = q = ConfigDict()       # what is decided without a policy
  q.least_coverage = free(0.0)     # share of the picture that its boxes cover, at least
  q.most_coverage = free(0.3)      # share of the picture that its boxes cover, at most
  q.keep_whole = free(False)       # keep tasks whose boxes are the whole picture, whether zooming helps or not
  q.whole_from = free(0.9)         # coverage that counts as whole
  q.least_box_px = free(36.0)      # fewest pixels of the smallest box, in the picture as it is shown
  q.need_boxes = free(True)        # drop tasks without a box
  q.most_boxes = free(8)           # most boxes of a task
  q.answer_types = free(("option", "yes_no", "number", "text"))  # which are kept; see data/curation/facts.py
  q.most_answer_chars = free(80)   # most characters of the shortest accepted answer
  q.most_question_chars = free(600)  # most characters of the question
  q.hash_distance = free(8)        # most bits of 64 in which the hashes of near-duplicate pictures differ
  q.pixel_difference = free(6.0)   # most levels of 255 by which their thumbnails differ on average
  q.question_similarity = free(0.9)  # least share of words that near-duplicate questions have in common
  q.per_picture = free(0)          # most tasks on pictures that are near-duplicates of each other; 0 for no limit
  q.caps = free(())                # "SOURCE=COUNT": most tasks of a source
  u.policy = q = ConfigDict()      # how a policy is asked about the tasks that remain
  q.with_zoom = free(8)            # samples of a task; 0, as in the next: the policy is not asked
  q.without_zoom = free(4)         # samples with zooming off
  q.temperature = free(1.0)        # of sampling
  u.filter = q = ConfigDict()      # which tasks its answers leave
  q.most_without = free(0.5)       # share right without zooming, above which a task needs no zoom
  q.least_pass = free(0.1)         # share right with zooms, below which it is too hard; above 0 drops the never solved
  q.most_pass = free(0.9)          # above which it is too easy; below 1 drops the always solved

  c.endpoint = q = ConfigDict()    # `--endpoint` of `curate` and `evaluate`, in place of the engine
  q.model = free("")               # as it names the policy; "" sends none [ours]
  q.timeout_s = free(300.0)        # for one turn [ours]
  q.wait_s = free(1.0)             # before the second try; then twice as long each time [ours]
  q.patience_s = free(3600.0)      # without any reply, until it counts as gone [ours]
  q.tries = free(8)                # of a request that fails while others have replies, until it is put aside [ours]
  q.in_flight = free(32)           # requests at a time, of each process [ours]

  c.warmstart = u = ConfigDict()   # `python -m virl_jax.warmstart`; it refuses a workdir where these differ; all [ours]
  # A warm start ends with the clumsy stage: demonstrations whose boxes are made worse on purpose, so that a base
  # reads well, zooms badly, and has something to learn.
  u.base = free("")                # HF folder to go on from, in the clumsy stage alone; "" starts from nothing
  u.p_direct = free(0.0)           # share of the clumsy stage's demonstrations that answer without a zoom
  u.p_clumsy = free(1.0)           # share of the clumsy stage's zooms whose box is made worse
  u.p_count = free(0.0)            # share of the clumsy stage's demonstrations that count objects with a mark
  u.steps = free(2500)             # optimizer updates
  u.pictures = free(8000)          # different pictures in each stage
  u.marks = free(("pattern",))     # kinds of marks, keys of needle.MARKS
  u.learning_rate = free(1.2e-3)   # peak learning rate of the stages before
  u.clumsy_learning_rate = free(3e-4)  # peak learning rate of the clumsy stage
  u.workers = free(2)              # processes that draw pictures
  u.save_every = free(100)         # updates between checkpoints; 0 for the last alone

  c.sft = b = ConfigDict()         # `python -m virl_jax.sft`; it refuses a workdir where these differ; see docs/sft.md
  b.data = free(())                # files of trajectories, or workdirs whose rollouts are learned from; --data
  b.batch = free(64)               # demonstrations per update [ours]
  b.frame = free("original")       # ShareGPT's boxes: pixels of the image's file (original) or as it is shown to the
                                   #   policy (shown), shares of its sides (share) or thousandths [ours]
  b.only_right = free(True)        # leave out trajectories whose answer is known to be wrong [ours]
  b.least_reward = free(-1e9)      # leave out trajectories that are known to have earned less [ours]
  b.best_of = free(0)              # of each task keep only so many trajectories, the best; 0 for all [ours]
  b.most_left_out = free(0.5)      # the run ends if more than this share of what was chosen is unusable [ours]
  b.cache_gib = free(2.0)          # GiB of this process for demonstrations kept ready; 0 keeps none [ours]

  c.watch = w = ConfigDict()       # slow steps and stuck runs; see docs/monitors.md
  w.stuck_s = free(3600.0)         # seconds without progress after which a run ends, to be started again; 0 for never
  w.slow_ratio = free(3.0)         # a step that takes so many times the median is reported; 0 for none

  c.log = g = ConfigDict()         # what a workdir keeps besides checkpoints
  g.gallery = free(8)              # trajectories kept for the report each time; 0 for none
  g.gallery_every = free(20)       # steps between kept rollouts; 0 keeps none while training
  g.bad_batches = free(4)          # most steps with skipped updates kept in bad_batches/; 0 for none [ours]
  g.tensorboard = free(True)       # write scalars where TensorBoard's writer is installed
  g.wandb = free("")               # project of Weights & Biases that the same numbers go to; "" for none; extra wandb
  g.peak_flops = free(0.0)         # peak of a device, bfloat16 operations/s, for speed/mfu; 0: by its name [ours]

  c.monitor = v = ConfigDict()     # alarms while training, see docs/monitors.md; all thresholds [ours]
  v.window = free(8)               # steps that means and medians are taken over [ours]
  v.past = free(16)                # steps before those that count as the recent past [ours]
  v.collapse_acc_ans = free(0.5)   # visual thinking collapse: share of right answers, at least [ours]
  v.collapse_zooms = free(0.1)     # visual thinking collapse: zooms per trajectory, at most [ours]
  v.explosion_ratio = free(1.5)    # invocation explosion: zooms against the recent past, at least [ours]
  v.explosion_zooms = free(0.5)    # invocation explosion: rise in zooms per trajectory, at least [ours]
  v.explosion_acc_drop = free(0.1)  # invocation explosion: fall of the share of right answers, at least [ours]
  v.superficial_zooms = free(2.0)  # superficial grounding: zooms per trajectory, at least [ours]
  v.superficial_acc_rat = free(0.2)  # superficial grounding: share of right zooms, at most [ours]
  v.hacking_log2 = free(1.0)       # box-size hacking: doublings between areas of box and truth, at least [ours]
  v.hacking_growth = free(0.5)     # box-size hacking: doublings more than in the first steps, at least [ours]
  v.hacking_fidelity_rise = free(0.1)  # box-size hacking: rise of the fidelity reward since then, at least [ours]
  v.entropy_nats = free(0.02)      # entropy collapse: nats per token, at most [ours]
  v.entropy_share = free(0.2)      # entropy collapse: or this share of the first steps' entropy, at most [ours]
  v.drift_mean_nats = free(0.05)   # sampler drift: mean gap of log-probabilities, nats, at least [ours]
  v.drift_max_nats = free(5.0)     # sampler drift: or the largest gap, nats, at least [ours]
  v.stop = free(())                # names of monitors that end the run; () for none [ours]
  return c


def to_json(c: ConfigDict) -> str:
  """The configuration as stable, readable JSON, as a workdir keeps it."""
  return json.dumps(json.loads(c.to_json(sort_keys=True)), indent=1, sort_keys=True) + "\n"


def from_json(text: str, where: str = "config.json") -> ConfigDict:
  """The inverse of `to_json`, for older versions too: keys that the text lacks keep their defaults, and old names
  become today's.

  Args:
    text: what a workdir's config.json holds.
    where: the name of the text in errors.

  Raises:
    ValueError: if it is not JSON, or has keys, types or values that this version does not know.
  """
  try:
    found = translate(_tuples(json.loads(text)))
    for key, value in flat(found).items():
      if key in REMOVED:
        raise ValueError(f"{key} = {value!r} is of an older version; this one only knows {REMOVED[key]!r}")
    c = default().lock()
    c.update(found)
    return c.unlock()
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise ValueError(f"{where} must be a configuration as a run writes it ({e})") from e


def translate(tree: dict) -> dict:
  """A configuration of an older version, under today's names.

  Args:
    tree: nested; a value under today's name wins over one that is translated to it.

  Returns:
    Nested.  Knobs of `REMOVED` are left out, unless they hold a value that is not supported any more.
  """
  new = {}
  for key, value in flat(tree).items():
    if key in REMOVED and value == REMOVED[key]:
      continue
    for name in RENAMED.get(key, (key,)):
      *sections, last = name.split(".")
      at = new
      for section in sections:
        at = at.setdefault(section, {})
      at[last] = at.get(last, value) if key in RENAMED else value
  return new


def _bare(tree):
  """Without the marks."""
  if isinstance(tree, dict):
    return {key: _bare(value) for key, value in tree.items()}
  return tree.value if isinstance(tree, _Free) else tree


def _tuples(tree):
  """JSON has no tuples; every sequence of a configuration is one."""
  if isinstance(tree, dict):
    return {k: _tuples(v) for k, v in tree.items()}
  return tuple(map(_tuples, tree)) if isinstance(tree, list) else tree
