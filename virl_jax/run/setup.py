"""From a ConfigDict to the frozen pieces that a run is made of."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import sys
import time
import traceback

from absl import app
from absl import flags
import jax
from ml_collections import config_flags

from virl_jax import checks
from virl_jax import config as config_lib
from virl_jax import shapes
from virl_jax import types
from virl_jax.data import endpoint
from virl_jax.data import images
from virl_jax.data import judge_model
from virl_jax.data import mixture
from virl_jax.data import prompt
from virl_jax.data.curation import stages as curation
from virl_jax.data.recorded import script
from virl_jax.eval import monitors
from virl_jax.learner import optim
from virl_jax.learner import state as state_lib
from virl_jax.model import family
from virl_jax.model import remat
from virl_jax.model import sharding
from virl_jax.model import weights
from virl_jax.rl import advantage
from virl_jax.rl import credit
from virl_jax.rl import loss
from virl_jax.rl import reward
from virl_jax.rollout import pack
from virl_jax.rollout import sample
from virl_jax.rollout import slots
from virl_jax.rollout import turns
from virl_jax.run import caches
from virl_jax.run import hosts
from virl_jax.run import load
from virl_jax.run import memory
from virl_jax.run import signals
from virl_jax.run import sources
from virl_jax.run import watch
from virl_jax.run import workdir as workdir_lib
from virl_jax.tiny import needle

# Half a unit in the last place of a weight of 0.01 is 3e-5, and AdamW's updates are about as large as the rate.
_LEAST_BFLOAT16_RATE = 1e-5


def quiet() -> None:
  """Silences libraries except for warnings; called before JAX looks for devices."""
  for chatty in ("absl", "jax"):  # Orbax logs every file that it writes, JAX every accelerator that it does not find
    logging.getLogger(chatty).setLevel(logging.WARNING)
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it warns that there is no PyTorch; none is needed


def begin() -> None:
  """What a program that runs a model does first: quiet libraries, kept memory, a cache of compiled programs."""
  quiet()
  memory.keep_when_on_cpu()
  caches.keep_programs()


def parse(argv: list[str]) -> list[str]:
  """Reads the command line, for `app.run`; an unknown knob ends the program with one line.

  Raises:
    SystemExit: in place of its error.
  """
  try:
    return app.parse_flags_with_usage(argv)
  except AttributeError as e:  # from inside the configuration, with a suggestion
    said: object = e
    while isinstance(said, Exception) and said.args:  # an error about an error
      said = said.args[0]
    raise SystemExit(f"error: --config has no such knob: {' '.join(str(said).split())}") from e


def config_file(values: flags.FlagValues) -> str:
  """The path that --config gives, without what may follow after a colon, which is for the file's `get_config`.

  Raises:
    ValueError: there is no such file.
  """
  flag = values["config"]
  path = config_flags.get_config_filename(flag).partition(":")[0] if flag.present else ""
  if not os.path.isfile(path):
    raise ValueError(f"--config must be a configuration's file, such as configs/tiny.py. Received: {path or 'nothing'}")
  return path


@contextlib.contextmanager
def told():
  """Ends the program with an error's message alone, in a line, or with all of it if VIRL_JAX_DEBUG is set.

  Raises:
    SystemExit: in place of any other exception.
  """
  try:
    yield
  except signals.Stopped as e:  # with several processes: all of them
    hosts.say(e)
    raise SystemExit(e.code) from None
  except Exception as e:
    signals.wait()
    if jax.process_count() > 1:
      _leave_others(e)
    if os.environ.get("VIRL_JAX_DEBUG"):
      raise
    raise SystemExit(f"error: {_words(e)} (VIRL_JAX_DEBUG=1 shows where)") from e
  finally:
    signals.wait()


def _words(e: Exception) -> str:
  """An error in a line: ours as it is, others with their type and only the first line."""
  return str(e) if isinstance(e, ValueError) else f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"


def _leave_others(e: Exception) -> None:
  """Prints what has failed, if it failed here, makes the others end, and ends this process.

  It does not exit in the usual way, because that would wait for the others.
  """
  if os.environ.get("VIRL_JAX_DEBUG"):
    traceback.print_exception(e)
  if not isinstance(e, hosts.Failed):
    print(f"error: process {jax.process_index()} on {platform.node()}: {_words(e)} (VIRL_JAX_DEBUG=1 shows where)",
          file=sys.stderr, flush=True)
    hosts.fail(_words(e))
  else:
    time.sleep(hosts.FAREWELL_S)  # before that `hosts` hears of the other's failure, prints it and ends this process
  os._exit(1)


@dataclasses.dataclass(frozen=True)
class Sections:
  """The sections of a configuration, each checked; those that are not here are used as they are."""

  needle: needle.Config
  image: images.Config
  prompt: prompt.Config
  rollout: turns.Config
  engine: slots.Config
  reward: reward.Config
  credit: credit.Config
  advantage: advantage.Config
  loss: loss.Config
  optim: optim.OptimConfig
  monitor: monitors.Config
  watch: watch.Config
  judge: judge_model.Config
  curate: curation.Config
  endpoint: endpoint.Config


def sections(c: config_lib.ConfigDict) -> Sections:
  """Checks a whole configuration, before anything slow starts.

  Raises:
    ValueError: names the key, what was wanted and what came.
  """
  share, count, some = checks.real(0, 1, wanted="a share in [0, 1]"), checks.whole(1), checks.whole(0)
  word = checks.whole(0, 2 ** 32 - 1)  # see `order.batch_indices`
  checks.section(c, "", seed=word, steps=some)
  dtype = (lambda v: v in ("float32", "bfloat16"), "'float32' or 'bfloat16'")
  checks.section(c.model, "model", path=checks.text, dtype=dtype, compute_dtype=dtype, remat=checks.flag,
                 remat_keep=checks.some_of(remat.NAMES), remat_offload=checks.some_of(remat.NAMES),
                 freeze_vision=checks.flag, patches_together=some, gather_vision=checks.flag)
  checks.section(c.lora, "lora", rank=some, alpha=checks.real(above=0), targets=checks.texts)
  checks.section(c.data, "data", path=checks.text, eval_path=checks.text,
                 source=(lambda v: v in sources.KINDS, " or ".join(map(repr, sources.KINDS))),
                 eval_fraction=checks.real(above=0, below=1, wanted="between 0 and 1"), split_seed=word,
                 weights=checks.texts, easy_first_epochs=some, easy_first_width=share)
  need, d = checks.need, c.data
  try:
    mixture.parse(d.weights)
  except ValueError as e:
    raise ValueError(f"config.data.weights: {e}") from e
  need(d.source != "needle" or not d.eval_path, "data.eval_path", "'' while config.data.source is 'needle'",
       d.eval_path)
  need(d.source != "needle" or not d.weights, "data.weights", "() while config.data.source is 'needle'", d.weights)
  need(d.source == "set" or not d.easy_first_epochs, "data.easy_first_epochs",
       "0 unless config.data.source is 'set': only sets come with pass rates", d.easy_first_epochs)
  for name, what in (("jsonl", "the path of a records file"), ("set", "the folder of a finished set")):
    checks.need(c.data.source != name or c.data.path, "data.path", f"{what} when config.data.source is {name!r}",
                c.data.path)
  r = c.rollout
  checks.section(r, "rollout", prompts=count, group_size=count, resample=some, tensor=count, mask_overlong=checks.flag,
                 mask_out_of_rounds=checks.flag)
  part = checks.real(above=0, high=1)
  checks.section(c.pack, "pack", pad_tokens=count, join_rows=checks.flag, crops_share=part, joined_share=part)
  checks.section(c.learner, "learner", microbatch_tokens=some, row_shown=count, row_crops=count,
                 offload=checks.some_of(state_lib.OFFLOAD))
  checks.section(c.ppo, "ppo", minibatches=count, epochs=count)
  axis = (lambda v: checks.whole(-1)[0](v) and v != 0, "at least 1, or -1 for what is left")
  checks.section(c.mesh, "mesh", data=axis, fsdp=axis, tensor=axis)
  checks.section(c.checkpoint, "checkpoint", every=some, keep=count, best=checks.text)
  checks.section(c.eval, "eval", tasks=some, temperature=checks.real(0, wanted="0 (greedy) or positive"),
                 bootstrap=count)
  checks.section(c.log, "log", gallery=some, gallery_every=some, bad_batches=some, tensorboard=checks.flag,
                 wandb=checks.text, peak_flops=checks.real(0))
  checks.section(c.warmstart, "warmstart", base=checks.text, p_direct=share, p_clumsy=share, p_count=share,
                 steps=count, pictures=count, marks=checks.some_of(needle.MARKS, 1), learning_rate=checks.real(0),
                 clumsy_learning_rate=checks.real(0), workers=count, save_every=some)
  checks.section(c.sft, "sft", data=checks.texts, batch=count, frame=checks.one_of(script.FRAMES),
                 only_right=checks.flag, least_reward=checks.real(), best_of=some, most_left_out=share,
                 cache_gib=checks.real(0))
  paths = [("model.path", c.model.path), ("data.path", c.data.path), ("data.eval_path", c.data.eval_path),
           ("warmstart.base", c.warmstart.base)]
  for key, path in paths + [("sft.data", path) for path in c.sft.data]:
    checks.need("://" not in path, key, "on a disk, for only a workdir may lie in a bucket: copy it, or mount that",
                path)
  found = Sections(
      needle=needle.Config(**c.data.needle), image=images.Config(**c.image), prompt=prompt.Config(**c.prompt),
      rollout=turns.Config(keep=sample.Filter(r.top_k, r.top_p, r.min_p), **_fields(turns.Config, r)),
      engine=slots.Config(**c.engine), reward=reward.Config(**c.reward), credit=credit.Config(**c.credit),
      advantage=advantage.Config(**c.advantage), loss=loss.Config(**c.loss), optim=optim.OptimConfig(**c.optim),
      monitor=monitors.Config(**c.monitor), watch=watch.Config(**c.watch), judge=judge_model.Config(**c.judge),
      curate=curation.config(c.curate), endpoint=endpoint.Config(**c.endpoint))
  _combinations(c)
  return found


def _combinations(c: config_lib.ConfigDict) -> None:
  """Refuses values that make no sense together, with the reason."""
  need, k, a, o, m = checks.need, c.credit, c.advantage, c.loss, c.model
  for key in ("remat_keep", "remat_offload"):
    need(m.remat or not m[key], f"model.{key}", "() while model.remat is False: nothing is computed again", m[key])
  need(not set(m.remat_keep) & set(m.remat_offload), "model.remat_offload",
       f"names that are not in config.model.remat_keep = {m.remat_keep}", m.remat_offload)
  need("reference" not in c.learner.offload or o.kl_coef > 0, "learner.offload",
       "without 'reference' while loss.kl_coef is 0: there is none", c.learner.offload)
  need(c.rollout.max_turn_tokens < c.rollout.max_total_tokens, "rollout.max_turn_tokens",
       f"below config.rollout.max_total_tokens = {c.rollout.max_total_tokens}: the prompt comes first",
       c.rollout.max_turn_tokens)
  need(not c.lora.rank or c.lora.targets, "lora.targets", "names of modules, as config.lora.rank is positive",
       c.lora.targets)
  need(not c.lora.rank or "reference" not in c.learner.offload, "learner.offload",
       "without 'reference' as config.lora.rank is positive: the frozen weights are the reference", c.learner.offload)
  need(c.rollout.prompts % c.ppo.minibatches == 0, "ppo.minibatches",
       f"a divisor of config.rollout.prompts = {c.rollout.prompts}", c.ppo.minibatches)
  longest = pack.width(c.rollout.max_total_tokens, c.pack.pad_tokens, c.pack.join_rows)
  need(not c.learner.microbatch_tokens or c.learner.microbatch_tokens >= longest, "learner.microbatch_tokens",
       f"0, or at least the {longest} tokens that a row can have", c.learner.microbatch_tokens)
  need(not c.learner.microbatch_tokens or c.learner.row_crops >= c.rollout.max_rounds, "learner.row_crops",
       f"at least config.rollout.max_rounds = {c.rollout.max_rounds}", c.learner.row_crops)
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


def cautions(c: config_lib.ConfigDict) -> list[str]:
  """Warnings about settings that work but are probably not meant, for the start of a program."""
  found = []
  if c.model.dtype == "bfloat16" and c.optim.learning_rate < _LEAST_BFLOAT16_RATE:
    found.append(
        f"config.model.dtype is 'bfloat16', and at config.optim.learning_rate = {c.optim.learning_rate:g} such "
        "parameters hardly move: an update is smaller than half a unit in their last place, and is rounded away (at "
        "1e-6, 0.5 % of them moved). Take --config.model.dtype=float32, with bfloat16 as compute_dtype, or LoRA")
  return found


@dataclasses.dataclass(frozen=True)
class Pieces:
  """The fixed parts of a run.

  Attributes:
    policy: for rollouts, in a layout of their own; see `sample.weights`.
    step: static argument of the learner's steps.
    pack: how batches are padded.
    mesh: the devices of training.
    hf_dir: the folder that the base came from.
  """

  policy: turns.Policy
  step: state_lib.Config
  pack: pack.Config
  mesh: jax.sharding.Mesh
  hf_dir: str


def pieces(c: config_lib.ConfigDict) -> Pieces:
  """Builds the pieces of a run, reading only the base's config and tokenizer.

  Raises:
    ValueError: if something that the configuration names is missing or does not fit.
  """
  sections(c)  # before anything is read
  hf_dir = load.model_dir(c.model.path)
  model = weights.read_config(hf_dir)
  return assemble(c, model, load.codec(hf_dir, model), hf_dir)


def of_policy(path: str, c: config_lib.ConfigDict | None = None
              ) -> tuple[config_lib.ConfigDict, load.Loaded, Pieces]:
  """What it takes to ask an existing policy.

  Args:
    path: a run's folder, an HF folder, or "@tiny".
    c: how prompts are worded and images shown, for an HF folder; None for the defaults.  A run has its own.

  Returns:
    A copy of the configuration, the weights, and the pieces.

  Raises:
    ValueError: there is no policy at that path, a run is given another configuration, or a piece does not fit.
  """
  loaded = load.policy(path, (c or config_lib.default()).model.dtype)
  c = _of_policy(path, loaded.config, c)
  model = weights.read_config(loaded.hf_dir)
  return c, loaded, assemble(c, model, load.codec(loaded.hf_dir, loaded.model), loaded.hf_dir)


def of_endpoint(path: str | None, c: config_lib.ConfigDict | None = None) -> tuple[config_lib.ConfigDict, Pieces]:
  """What a policy that an endpoint serves is asked with; no weights are read.

  Args:
    path: a run's folder, an HF folder, or "@tiny", for its shapes and its tokenizer; None for the configuration's
      `model.path`.
    c: as for `of_policy`.

  Returns:
    A copy of the configuration, and the pieces.

  Raises:
    ValueError: as `of_policy`.
  """
  own = workdir_lib.config(path) if path and load.is_run(path) else None
  c = _of_policy(path or (c or config_lib.default()).model.path, own, c)
  return c, pieces(c)


def _of_policy(path: str, own: config_lib.ConfigDict | None, c: config_lib.ConfigDict | None) -> config_lib.ConfigDict:
  """A copy of a run's own configuration, or of the one for an HF folder, with that folder as its model.path."""
  if own is not None and c is not None:
    raise ValueError(f"--config must be left out for {path}: a run has its own")
  found = config_lib.ConfigDict((own or c or config_lib.default()).to_dict())
  if own is None:
    found.model.path = path
  return found


def assemble(c: config_lib.ConfigDict, model: family.Config, codec: prompt.Codec | None, hf_dir: str, devices=None
             ) -> Pieces:
  """`pieces` from what has been read already.

  Args:
    c: the configuration.
    model: the base's shapes and ids.
    codec: its tokenizer; None if nothing will be rolled out.
    hf_dir: where it came from.
    devices: what to run on, or to compile for; None for all there are.

  Raises:
    ValueError: if the configuration does not fit the model or the devices.
  """
  s = sections(c)
  mesh = sharding.make(c.mesh.data, c.mesh.fsdp, c.mesh.tensor, devices)
  model = dataclasses.replace(load.of_config(c, model), platform=sharding.platform(mesh.devices.flat[0]))
  family.tables(model)  # refuses targets that no parameter has
  for key, names in (("model.remat_offload", c.model.remat_offload), ("learner.offload", c.learner.offload)):
    checks.need(not names or sharding.host_memory(mesh), key,
                f"() on a {model.platform}, which has no pinned memory of the host here", names)
  heads = model.text.kv_heads
  for key, tensor in (("mesh.tensor", mesh.shape["tensor"]), ("rollout.tensor", c.rollout.tensor)):
    checks.need(heads % tensor == 0, key, f"a divisor of the model's {heads} key/value heads", tensor)
  checks.need(mesh.size % c.rollout.tensor == 0, "rollout.tensor", f"a divisor of the {mesh.size} devices",
              c.rollout.tensor)
  rows, processes = c.rollout.prompts * c.rollout.group_size // c.ppo.minibatches, jax.process_count()
  checks.need(devices is not None or c.rollout.prompts // c.ppo.minibatches % processes == 0, "rollout.prompts",
              f"a multiple of config.ppo.minibatches = {c.ppo.minibatches} times the {processes} processes",
              c.rollout.prompts)
  shards = sharding.row_shards(mesh)
  if rows % shards:
    raise ValueError(f"config.rollout.prompts * group_size / ppo.minibatches must be a multiple of the mesh's "
                     f"data x fsdp = {shards}. Received: {rows}")
  part = lambda share: shapes.up(int(share * rows), shards)
  return Pieces(
      policy=turns.Policy(model, codec, s.prompt, s.image, s.rollout, sharding.replicas(mesh, c.rollout.tensor),
                          s.engine),
      step=state_lib.Config(model, c.rollout.group_size, c.rollout.temperature, s.reward, s.credit, s.advantage, s.loss,
                           s.optim, mesh, single_update=c.ppo.minibatches * c.ppo.epochs == 1,
                           offload=tuple(c.learner.offload)),
      pack=pack.Config(model.vision.grid, model.image_token, c.rollout.max_rounds, c.pack.pad_tokens,
                       pad_images=part(c.pack.crops_share),
                       pad_shown=max(shards, rows // c.rollout.group_size),  # a group shares its image
                       mask_stops=tuple(reason for reason, masked in (
                           (types.StopReason.OVERLONG, c.rollout.mask_overlong),
                           (types.StopReason.OUT_OF_ROUNDS, c.rollout.mask_out_of_rounds)) if masked),
                       scope=c.credit.scope, join=c.pack.join_rows, pad_joined=part(c.pack.joined_share),
                       shards=shards, **_fields(pack.Config, c.learner)),
      mesh=mesh, hf_dir=hf_dir)


def _fields(kind, section) -> dict:
  """The values of a section of the configuration that a dataclass has fields for."""
  return {f.name: section[f.name] for f in dataclasses.fields(kind) if f.name in section}
