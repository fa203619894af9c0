"""What the steps begin with: their configuration, and the state that training carries from step to step.

Also where these lie, on a mesh and in which memory: trained parameters, their moments, the reference for the KL term.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import optax

from virl_jax.learner import optim
from virl_jax.model import family
from virl_jax.model import sharding
from virl_jax.model import tuning
from virl_jax.rl import advantage
from virl_jax.rl import credit
from virl_jax.rl import judge
from virl_jax.rl import loss
from virl_jax.rl import reward

OFFLOAD = ("optimizer", "reference")


@dataclasses.dataclass(frozen=True)
class Config:
  """What the steps need besides arrays; hashable, so that it can be a static argument.

  With a mesh, updated parameters and moments stay where `sharding.param_shardings` puts them.  Left alone, the
  partitioner moves some of them, and the next step is compiled again.

  With `single_update`, a batch serves one update, of the policy that scores it: where scoring itself needs no
  log-probabilities, it leaves them to the update's own forward pass.

  What `offload` names, out of `OFFLOAD`, lies in pinned memory of the host between steps: the optimizer's moments, the
  reference for the KL term.  A step moves it to the device and back.
  """

  model: family.Config
  group_size: int
  temperature: float = 1.0
  reward: reward.Config = reward.Config()
  credit: credit.Config = credit.Config()
  advantage: advantage.Config = advantage.Config()
  loss: loss.Config = loss.Config()
  optim: optim.OptimConfig = optim.OptimConfig()
  mesh: jax.sharding.Mesh | None = None
  single_update: bool = False
  offload: tuple[str, ...] = ()

  @property
  def judge(self) -> judge.Config:
    """What a batch is judged by."""
    return judge.Config(self.group_size, self.reward, self.credit, self.advantage)


@flax.struct.dataclass
class TrainState:
  """All that training carries from step to step; no RNG, no iterator, no clock, and nothing that is frozen.

  Attributes:
    update: int32 scalar, optimizer updates so far; skipped ones don't count.
    params: the policy's trained parameters; `family.whole` joins them with the frozen ones.
    opt_state: the optimizer's moments and counters.
    kl_coef: float32 scalar, weight of the KL term; moves if it is adaptive.
    critic: the value head, "w" float32[D] and "b" float32[1]; None if there is none.
    critic_opt_state: its moments.
  """

  update: jax.Array
  params: dict
  opt_state: optax.OptState
  kl_coef: jax.Array
  critic: dict | None = None
  critic_opt_state: optax.OptState | None = None


def abstract(params: dict, cfg: optim.OptimConfig, critic_width: int = 0, offload: Sequence[str] = (),
             specs: dict | None = None) -> TrainState:
  """Shapes of a state, and where it lies: moments like their parameters, all else whole on every device.

  Args:
    params: the policy, or its `jax.ShapeDtypeStruct`s with shardings.
    cfg: the optimizers.
    critic_width: D, for a value head; 0 for none.
    offload: with "optimizer" among it, moments lie in pinned memory of the host; see `Config`.
    specs: the parameters' table; see `optim.optimizer`.

  Returns:
    A state of `jax.ShapeDtypeStruct`s; without shardings if the parameters are not on a mesh.

  Raises:
    ValueError: moments are to lie in the host's memory, and there is no mesh or no such memory.
  """
  first = jax.tree.leaves(params)[0].sharding
  whole = sharding.replicated(first.mesh) if isinstance(first, jax.sharding.NamedSharding) else None
  host = "optimizer" in offload
  if whole is None and host:
    raise ValueError(f"parameters must be on a mesh for an optimizer that is offloaded. Received: {first}")
  spec = lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)
  put = lambda tree: jax.tree.map(lambda a: spec(a, whole), tree)
  opt_state = jax.eval_shape(optim.optimizer(cfg, specs).init, params)
  opt_state = put(opt_state) if whole is None else jax.tree.map(
      spec, opt_state, optim.shardings(opt_state, params, whole, host))
  scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=whole)
  critic = critic_opt_state = None
  if critic_width:
    critic = {"w": jax.ShapeDtypeStruct((critic_width,), jnp.float32, sharding=whole),
              "b": jax.ShapeDtypeStruct((1,), jnp.float32, sharding=whole)}
    critic_opt_state = put(jax.eval_shape(optim.critic_optimizer(cfg).init, critic))
  return TrainState(scalar(jnp.int32), jax.tree.map(lambda a: spec(a, a.sharding), params), opt_state,
                    scalar(jnp.float32), critic, critic_opt_state)


def init(params: dict, cfg: optim.OptimConfig, kl_coef: float = 0.0, critic_width: int = 0,
               offload: Sequence[str] = (), specs: dict | None = None) -> TrainState:
  """A fresh state around parameters, laid out as `abstract` says.

  Args:
    params: the policy's trained parameters.
    cfg: the optimizers.
    kl_coef: the first weight of the KL term.
    critic_width: D, for a value head that expects nothing (0) at first; 0 for none.
    offload, specs: see `abstract`.
  """
  like = abstract(params, cfg, critic_width, offload, specs)
  where = lambda tree: jax.tree.map(lambda a: a.sharding, tree)
  rest = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like.replace(params=None, opt_state=None))
  rest = rest.replace(kl_coef=jnp.float32(kl_coef))
  if like.critic is not None:
    rest = rest.replace(critic_opt_state=optim.critic_optimizer(cfg).init(rest.critic))
  moments = optim.optimizer(cfg, specs).init
  if like.update.sharding is None:
    return rest.replace(params=params, opt_state=jax.jit(moments)(params))
  rest = jax.device_put(rest, like.update.sharding)
  # Zeros depend on no input, so that jit by itself would put them whole on every device.  They are made on the devices
  # and moved after: older compilers cannot make constants in the host's memory.
  before = optim.shardings(like.opt_state, params, like.update.sharding)
  opt_state = jax.jit(moments, out_shardings=before)(params)
  return rest.replace(params=params, opt_state=jax.device_put(opt_state, where(like.opt_state)))


def reference(trained: dict, frozen: dict, cfg: Config) -> dict:
  """The policy as it is now, kept for the KL term.

  Trained parameters are copied, because updates are donated their arrays; if the reference is offloaded, all
  parameters are, into pinned memory of the host.

  Args:
    trained, frozen: arrays, or `jax.ShapeDtypeStruct`s.
    cfg: what is trained, and whether the reference is offloaded.

  Raises:
    ValueError: the reference is to be offloaded, and the platform has no such memory.
  """
  params = tuning.reference(trained, frozen, cfg.model.tuning)
  put = lambda a, where: (jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)
                          if isinstance(a, jax.ShapeDtypeStruct) else jax.device_put(a, where))
  if "reference" not in cfg.offload:
    return params
  return jax.tree.map(lambda a: put(a, sharding.in_host(a.sharding)), params)


def places(cfg: Config) -> dict:
  """Shardings of the trained parameters on the mesh."""
  return sharding.param_shardings(family.tables(cfg.model)[0], cfg.mesh)


def pinned(params: dict, cfg: Config) -> dict:
  """Trained parameters, or anything of their shapes, constrained to their shardings; within a program."""
  if cfg.mesh is None:
    return params
  return jax.tree.map(jax.lax.with_sharding_constraint, params, places(cfg))


def on_device(tree):
  """Arrays that lie in the host's memory, moved to the device with the same sharding; within a program."""
  return jax.tree.map(lambda a: jax.device_put(a, jax.memory.Space.Device), tree)
