"""Losses and their gradients against trl's (extra `parity`)."""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from virl_jax.rl import loss

torch = pytest.importorskip("torch", reason="torch comes with the extra `parity`")
grpo = pytest.importorskip("trl.trainer.grpo_trainer", reason="trl is not here")

B, T, NORM, CAP = 6, 20, 50, 1.5
# For trl: its options, where they differ from those in `trl_loss`.  For us: ours.
CASES = {
    "grpo": (dict(loss_type="grpo", beta=0.1), dict(aggregate="sequence", kl_coef=0.1)),
    "bnpo": (dict(loss_type="bnpo", entropy_coef=0.02), dict(entropy_coef=0.02)),
    "dr_grpo": (dict(loss_type="dr_grpo", beta=0.1), dict(aggregate="constant", norm_tokens=NORM, kl_coef=0.1)),
    "dapo": (dict(loss_type="dapo", beta=0.1), dict(kl_coef=0.1)),
    "two-sided": (dict(loss_type="bnpo", delta=2.0), dict(dual_clip=2.0)),
    "gspo": (dict(loss_type="grpo", importance_sampling_level="sequence"), dict(kind="gspo", aggregate="sequence")),
    # trl caps CISPO's weight and has no floor for it.
    "cispo": (dict(loss_type="cispo", epsilon_high=1.4), dict(kind="cispo", clip_low=1.0, clip_high=0.4)),
    "truncated weights": (dict(loss_type="bnpo", use_vllm=True), dict(sampler_cap=CAP)),
}


def trl_loss(d, advantage, options):
  """trl's loss and its gradient, by the method alone: a whole trainer would need a model and a data set."""
  args = types.SimpleNamespace(delta=options.pop("delta", None), use_bias_correction_kl=False, steps_per_generation=1)
  same = lambda x, **_: x
  logp_BT, coef = torch.tensor(d["logp"], requires_grad=True), options.pop("entropy_coef", 0.0)
  trainer = types.SimpleNamespace(**(dict(
      aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, args=args, beta=0.0,
      importance_sampling_level="token", epsilon_low=0.2, epsilon_high=0.28, use_vllm=False, use_adaptive_entropy=False,
      vllm_importance_sampling_correction=True, model=types.SimpleNamespace(training=True), entropy_coef=coef,
      current_gradient_accumulation_steps=1, max_completion_length=NORM, _entropy_bonus_enabled=coef > 0,
      accelerator=types.SimpleNamespace(num_processes=1, gather=same, reduce=same, sync_gradients=True),
      _metrics={"train": collections.defaultdict(list)},
      _get_per_token_logps_and_entropies=lambda *a, **k: (logp_BT, torch.tensor(d["entropy"]), None)) | options))
  mask, ids = torch.tensor(d["mask"], dtype=torch.float32), torch.zeros(B, T, dtype=torch.long)
  total = grpo.GRPOTrainer._compute_loss(trainer, None, dict(
      prompt_ids=ids, prompt_mask=mask, completion_ids=ids, completion_mask=mask, advantages=torch.tensor(advantage),
      old_per_token_logps=torch.tensor(d["old"]), ref_per_token_logps=torch.tensor(d["ref"]),
      num_items_in_batch=mask.sum(),
      importance_sampling_ratio=torch.tensor(np.minimum(np.exp(d["old"] - d["sampler"]), CAP))))
  total.backward()
  return total.item(), logp_BT.grad.numpy()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("of_tokens", [False, True])
def test_loss_and_gradient(case, of_tokens):
  if case == "gspo" and of_tokens:
    pytest.skip("trl's tokens share their sequence's gradient; ours keep each its own (GSPO, eq. 14)")
  rng = np.random.default_rng(0)
  draw = lambda scale, *shape: (scale * rng.normal(size=shape)).astype(np.float32)
  d = {"old": draw(1, B, T) - 2, "entropy": np.abs(draw(1, B, T)), "mask": rng.random((B, T)) < 0.7}
  d |= {"logp": d["old"] + draw(0.4, B, T), "ref": d["old"] + draw(0.5, B, T), "sampler": d["old"] + draw(0.5, B, T)}
  advantage = draw(1, B, T) if of_tokens else draw(1, B)
  options, changes = CASES[case]
  advantage_BT = advantage if of_tokens else np.repeat(advantage[:, None], T, 1)
  ours = jax.value_and_grad(lambda logp_BT: loss.policy_loss(
      logp_BT, d["old"], d["ref"], d["entropy"], advantage_BT, d["mask"], loss.Config(**changes), d["sampler"])[0])
  for a, b in zip(ours(jnp.asarray(d["logp"])), trl_loss(d, advantage, dict(options))):
    np.testing.assert_allclose(a, b, atol=1e-6)
