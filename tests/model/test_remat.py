"""What layers keep for the backward pass: each name has an effect, and gradients stay the same."""

import collections
import dataclasses
import re

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from virl_jax.model import attention
from virl_jax.model import patches
from virl_jax.model import remat
from virl_jax.model import sharding
from virl_jax.model.qwen2_5 import model as qwen
from virl_jax.model.qwen2_5 import text
from virl_jax.model.qwen2_5 import vision

B, T = 2, 12


def saved(fn, capsys, *args) -> collections.Counter:
  """How many arrays of each kind, such as "float32[2, 3]" and "host float32[2, 3]", are kept for the backward pass."""
  capsys.readouterr()
  jax.ad_checkpoint.print_saved_residuals(fn, *args)
  found = collections.Counter()
  for line in capsys.readouterr().out.splitlines():
    kind = re.match(r"(f32)(<host>)?\[([\d,]+)\]", line)
    if kind and "argument" not in line and "constant" not in line:
      found[("host " if kind.group(2) else "") + kind.group(3)] += 1
  return found


def decoder(small, kept, platform="cpu", length=T):
  """A loss of the decoder's, and its arguments."""
  cfg = small.cfg.text
  x = np.random.default_rng(0).standard_normal((B, length, cfg.hidden), np.float32)
  pos = np.broadcast_to(np.arange(length, dtype=np.int32), (B, 3, length))

  def loss(params, x):
    h = text.apply(params, cfg, x, pos, jnp.zeros((B, length), jnp.int32), True, platform=platform, kept=kept)
    return jnp.square(h).sum()

  return loss, small.params["text"], x


def tower(small, kept):
  """A loss of the vision tower's, for two images of 4 x 4 patches, and its arguments."""
  cfg = small.cfg.vision
  rng = np.random.default_rng(0)
  image = lambda: qwen.types.ImageInput(rng.standard_normal((16, cfg.grid.values), np.float32), (4, 4),
                                        qwen.types.Box(0, 0, 56, 56))
  batch, _ = patches.layout([image(), image()], cfg.grid)

  def loss(params):
    return jnp.square(vision.encode(params, cfg, batch, remat=True, kept=kept)).sum()

  return loss, small.params["vision"]


def sizes(small):
  """What is kept under each name in the decoder's two layers, as `saved` counts it."""
  t = small.cfg.text
  head = lambda n: f"2,{B},{T},{n},{t.head_size}"
  return {"attention": {head(t.heads): 1}, "mlp": {f"2,{B},{T},{t.intermediate}": 2},
          "qkv": collections.Counter({head(t.heads): 1}) + collections.Counter({head(t.kv_heads): 2})}


@pytest.mark.parametrize("names", [("attention",), ("mlp",), ("qkv",), remat.NAMES])
def test_what_is_named_is_kept_and_no_more(small, capsys, names):
  plain = saved(*decoder(small, remat.Kept())[:1], capsys, *decoder(small, remat.Kept())[1:])
  for where, kept in (("", remat.Kept(names)), ("host ", remat.Kept((), names))):
    loss, *args = decoder(small, kept)
    want = sum((collections.Counter({where + k: n for k, n in sizes(small)[name].items()}) for name in names),
               collections.Counter())
    assert saved(loss, capsys, *args) - plain == want
    assert not plain - saved(loss, capsys, *args)


def test_some_on_the_device_and_some_on_the_host(small, capsys):
  loss, *args = decoder(small, remat.Kept(("attention",), ("mlp",)))
  found, s = saved(loss, capsys, *args), sizes(small)
  (attention_,), (mlp,) = s["attention"], s["mlp"]
  assert found[attention_] == 1 and found["host " + mlp] == 2 and not found["host " + attention_] and not found[mlp]


def test_the_vision_tower_keeps_the_same(small, capsys):
  v = small.cfg.vision
  heads, inner = f"1,2,16,{v.heads},{v.head_size}", f"1,2,16,{v.intermediate}"  # its two blocks are of two kinds
  count = lambda *names: saved(*tower(small, remat.Kept(names))[:1], capsys, *tower(small, remat.Kept(names))[1:])
  plain = count()
  assert count("attention") - plain == {heads: 2} and count("mlp") - plain == {inner: 4}
  assert count("qkv") - plain == {heads: 6}


@pytest.mark.parametrize("devices", [1, 4])
def test_a_kernel_keeps_what_its_backward_pass_wants(small, capsys, devices):
  """Its output, and a number for each token and head: without them the whole kernel would run again."""
  with sharding.context(sharding.make(1, 2, 2, devices=jax.devices()[:4]) if devices > 1 else None):
    count = {}
    for names in ((), ("attention",)):
      loss, *args = decoder(small, remat.Kept(names), "tpu", 128)
      count[names] = saved(loss, capsys, *args)
  more = count["attention",] - count[()]
  assert attention.choose("tpu", jnp.float32, 128, 8, False) == "splash"
  numbers = sum(n * np.prod([int(s) for s in k.split(",")]) for k, n in more.items())
  assert numbers == 2 * B * 128 * 4 * (8 + 1) and sum(more.values()) == 2


def test_cudnn_s_output_is_told_by_its_primitive():
  """It names nothing itself; what the policy decides can be seen without its compiler."""
  primitive = jax.extend.core.Primitive("dot_product_attention_fwd_wrapper")
  primitive.multiple_results = True
  primitive.def_abstract_eval(lambda x: [x, x])
  grad = jax.extend.core.Primitive("dot_product_attention_bwd_wrapper")
  grad.def_abstract_eval(lambda out, ct: ct)

  @jax.custom_vjp
  def attend(x):
    return primitive.bind(x)[0]

  attend.defvjp(lambda x: tuple(primitive.bind(x)), lambda statistic, ct: (grad.bind(statistic, ct),))
  for kept, runs in ((remat.Kept(), 2), (remat.Kept(("qkv",)), 2), (remat.Kept(("attention",)), 1),
                     (remat.Kept((), ("attention",)), 1), (remat.Kept(("mlp",), ("qkv",)), 2)):
    fn = remat.layer(lambda x: jnp.sin(attend(x)).sum(), True, kept)
    program = str(jax.make_jaxpr(jax.grad(fn))(jnp.ones(3)))
    assert program.count(" = dot_product_attention_fwd_wrapper ") == runs, kept
    assert program.count(" = dot_product_attention_bwd_wrapper ") == 1
    assert ("<host>" in program or "pinned_host" in program) == ("attention" in kept.host)


def grads(small, **changes):
  """The gradient of the whole model."""
  cfg = dataclasses.replace(small.cfg, **changes)
  rng = np.random.default_rng(1)
  image = lambda: qwen.types.ImageInput(rng.standard_normal((16, cfg.vision.grid.values), np.float32), (4, 4),
                                        qwen.types.Box(0, 0, 56, 56))
  batch, index = patches.layout([image(), image()], cfg.vision.grid)
  tokens, seen = np.full((B, T), 20, np.int32), np.full((B, T), -1, np.int32)
  seen[0, 1:5], seen[1, 2:6] = index[0], index[1]
  pos = np.broadcast_to(np.arange(T, dtype=np.int32), (B, 3, T))

  def value(params):
    h = qwen.hidden(params, cfg, tokens, pos, np.ones((B, T), bool), seen, (batch,))
    return jnp.square(h - 1).mean()

  return jax.jit(jax.grad(value))(small.params)


@pytest.fixture(scope="module")
def plain(small):
  return grads(small, remat=True)


@pytest.mark.parametrize("changes", [
    dict(remat_keep=remat.NAMES), dict(remat_offload=remat.NAMES),
    dict(remat_keep=("qkv",), remat_offload=("mlp",), patches_together=16)])
def test_gradients_are_the_same_whatever_is_kept(small, plain, changes):
  assert sharding.host_memory(sharding.make())
  found = grads(small, remat=True, **changes)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, plain)
  assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(plain)) > 0.1


def test_what_there_is_not_is_named(small):
  with pytest.raises(ValueError, match="must be among attention, mlp, qkv. Received: kv, out"):
    remat.Kept(("kv", "mlp"), ("out",))
  with pytest.raises(ValueError, match="Received both for: mlp, qkv"):
    remat.Kept(("qkv", "mlp"), ("qkv", "mlp"))
  with pytest.raises(ValueError, match="must be among attention, mlp, qkv. Received: scores"):
    dataclasses.replace(small.cfg, remat_keep=("scores",))
