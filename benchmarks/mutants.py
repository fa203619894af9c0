"""Plants bugs of one line each, and says which of them the tests notice.

    python benchmarks/mutants.py                    # all, two at a time: about half an hour on two cores
    python benchmarks/mutants.py --only=rl/reward   # those of one file

Each bug is planted by itself on a copy of the repository; then the tests that mirror the file are run, and stop at the
first that fails.  A bug that no test notices has survived: it needs a test, or the line is not needed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import timing  # of this folder

ROOT = pathlib.Path(__file__).parents[1]

# The tests that mirror a file, if these are not just tests/FOLDER/test_FILE.py.
MIRRORS = {
    "train.py": "test_wiring.py",
    "run/loop.py": "test_wiring.py",
    "data/recorded/chat.py": "data/recorded/test_table.py",
    "data/recorded/mini_o3.py": "data/recorded/test_table.py",
    "data/recorded/sharegpt.py": "data/recorded/test_table.py",
    "data/recorded/rollouts.py": "data/recorded/test_table.py",
    "rl/reward.py": "rl/test_reward.py rl/test_reward_modes.py",
    "rl/judge.py": "learner/test_step.py rollout/test_dynamic.py",
    "rollout/row.py": "rollout/test_scripted.py",
    "rollout/chunks.py": "rollout/test_scripted.py",
    "rollout/engine.py": "rollout/test_scripted.py rollout/test_engine.py",
    "rollout/actions/zoom.py": "rollout/test_turns.py data/test_prompt.py",
    "report/page.py": "report/test_html.py report/test_benchmark.py",
    "report/trajectory.py": "report/test_html.py report/test_benchmark.py",
    "eval/outcome.py": "eval/test_outcome.py eval/test_compare.py",
    "learner/microbatch.py": "learner/test_step.py",
    "learner/state.py": "learner/test_step.py",
    "types.py": "learner/test_step.py",
    "model/head.py": "rollout/test_sample.py learner/test_step.py",
    "model/cache_kernels.py": "model/test_cache.py",
    "model/layers.py": "model/test_qwen.py model/test_tuning.py model/test_parity.py",
    "model/weights.py": "model/test_weights.py model/test_tuning.py model/test_parity.py",
    "run/programs.py": "test_plan.py",
    "model/qwen2_5/text.py": "model/test_qwen.py model/test_parity.py",
    "model/qwen2_5/vision.py": "model/test_qwen.py model/test_parity.py",
    "data/endpoint.py": "rollout/test_remote.py data/test_judge_model.py",
    "data/curation/band.py": "data/curation/test_rules.py",
    "data/curation/parts.py": "data/curation/test_parts.py data/curation/test_build.py",
    "data/curation/policy.py": "data/curation/test_funnel.py",
    "data/sources/jsonl.py": "data/test_jsonl.py",
    "data/sources/set_files.py": "data/sources/test_set_files.py data/sources/test_sets.py",
    "data/sources/gqa.py": "data/sources/test_formats.py",
    "data/sources/visual_cot.py": "data/sources/test_formats.py",
    "data/sources/textvqa.py": "data/sources/test_formats.py",
    "data/sources/grit.py": "data/sources/test_formats.py",
    **dict.fromkeys(("eval/benchmarks/hrbench.py", "eval/benchmarks/pope.py", "eval/benchmarks/treebench.py",
                     "eval/benchmarks/rows.py"), "eval/test_benchmarks.py eval/test_scorer_agreement.py"),
    "eval/predictions.py": "eval/test_predictions.py",
    "eval/asked.py": "eval/test_asked.py",
    "eval/figures.py": "eval/test_figures.py",
}


@dataclasses.dataclass(frozen=True)
class Mutant:
  """One bug.

  Attributes:
    file: below virl_jax/.
    old: the code that it replaces, which is in the file exactly once.
    new: the code that replaces it.
    what: the bug, in words.
  """

  file: str
  old: str
  new: str
  what: str

  @property
  def tests(self) -> list[str]:
    """What mirrors the file."""
    folder, _, name = self.file.rpartition("/")
    return [f"tests/{t}" for t in MIRRORS.get(self.file, f"{folder}/test_{name}").split()]


MUTANTS = [Mutant(*m) for m in (
    # --- the reward ---------------------------------------------------------------------------------------------
    ("rl/reward.py", "correct = judged & (value >= h0)", "correct = judged & (value > h0)", "h0 itself is a miss"),
    ("rl/reward.py", "& (score_J <= best_J + cfg.refine_margin)", "& (score_J <= best_J)", "no margin"),
    ("rl/reward.py", "(~hit_J | stale_J).all()", "(hit_J & stale_J).any()", "redundant if any target was hit before"),
    ("rl/reward.py", "jnp.where(judged, jnp.maximum(best_J, score_J), best_J)",
     "best_J.at[target].max(jnp.where(judged, value, -1.0))", "a score counts for the action's own target only"),
    ("rl/reward.py", "value - jnp.maximum(best, 0.0)", "value", "no running best: each look is a refinement"),
    ("rl/reward.py", "- jnp.where(redundant, cfg.rho, 0.0)", "- jnp.where(correct, cfg.rho, 0.0)",
     "every hit pays for redundancy"),
    ("rl/reward.py", "mean = jnp.where(judged_R.any(), found, cfg.no_action)", "mean = found",
     "never zooming costs nothing"),
    ("rl/reward.py", "jnp.minimum(_ratio(shared_NM, area_N1 + area_1M - shared_NM), 1.0)",
     "jnp.minimum(_ratio(shared_NM, area_N1 + area_1M), 1.0)", "IoU over the sum of the areas"),
    ("rl/reward.py", "mine_RT, order_T[None], 0).max(-1)", "mine_RT, order_T[None], 10 ** 6).min(-1)",
     "an action's reward on its first token"),
    ("rl/reward.py", "min(1.0, step / cfg.h0_steps)", "step / cfg.h0_steps", "h0 runs past its end"),
    # --- credit, advantages -------------------------------------------------------------------------------------
    ("rl/credit.py", "class_R = jnp.where(redundant_R, REDUNDANT, jnp.where(correct_R, CORRECT, ERRONEOUS))",
     "class_R = jnp.where(correct_R, CORRECT, jnp.where(redundant_R, REDUNDANT, ERRONEOUS))",
     "a redundant hit is a correct one"),
    ("rl/credit.py", "blame_R if cfg.mirror else praise_R", "praise_R", "no mirror"),
    ("rl/credit.py", "return jnp.where(class_R == NONE, 1.0, m_R)", "return m_R",
     "actions that can't be judged are modulated"),
    ("rl/credit.py", "return jnp.where(sampled_T, value_T, 0.0)", "return value_T", "tool results are trained on"),
    ("rl/advantage.py", "jnp.maximum(of.square / jnp.maximum(of.count, 1), floor ** 2)",
     "of.square / jnp.maximum(of.count, 1)", "the deviation has no floor"),
    ("rl/advantage.py", "* (count / jnp.maximum(count - 1, 1))", "", "RLOO with the row itself in its baseline"),
    ("rl/advantage.py", "start, (reward_T, value_T, mask_T), reverse=True)", "start, (reward_T, value_T, mask_T))",
     "GAE looks back"),
    ("rl/advantage.py", "jnp.where(real, value, next_value)", "value", "GAE bootstraps from tool results"),
    ("rl/advantage.py", "base + (count_N * (mean_N - base)).sum() / jnp.maximum(count, 1)", "mean_N.mean()",
     "parts count alike, however large"),
    ("rl/judge.py", "looks.judged_BR & row_mask_B[:, None]", "looks.judged_BR", "masked rows in additive credit"),
    ("rl/judge.py", "advantage.standardize(returns.raw_BT, trained_BT, True, cfg.advantage.std_floor, of)",
     "advantage.standardize(returns.raw_BT, jnp.ones_like(trained_BT), True, cfg.advantage.std_floor)",
     "masked tokens are whitened in"),
    ("rl/judge.py", "returns.moments if of is None else of", "returns.moments",
     "statistics of a minibatch, not of the batch"),
    ("rl/judge.py", "reward_BT = reward_BT - kl_BT", "reward_BT = reward_BT.at[:, -1].add(-kl_BT.sum(-1))",
     "all of a trajectory's KL at its end"),
    ("rl/judge.py", "fidelity = jax.vmap(lambda *a: reward.fidelity(*a, cfg, h0))(*boxes)",
     "fidelity = jax.vmap(lambda *a: reward.fidelity(*a, cfg))(*boxes)", "the scheduled threshold is not used"),
    ("rl/judge.py", "cfg.group_size, mask_B, least)", "cfg.group_size, None, least)",
     "masked rows make a group informative"),
    # --- the loss -----------------------------------------------------------------------------------------------
    ("rl/loss.py", "-jax.lax.stop_gradient(kept_BT) * advantage_BT * logp_BT", "-kept_BT * advantage_BT * logp_BT",
     "CISPO without its stop-gradient"),
    ("rl/loss.py", "gain_BT, clipped_BT = jnp.minimum(free_BT, held_BT)",
     "gain_BT, clipped_BT = jnp.maximum(free_BT, held_BT)", "the optimistic side of the clip"),
    ("rl/loss.py", "jnp.clip(ratio_BT, 1.0 - cfg.clip_low, 1.0 + cfg.clip_high)",
     "jnp.clip(ratio_BT, 1.0 - cfg.clip_low, 1.0 + cfg.clip_low)", "clip_high is not used"),
    ("rl/loss.py", "return jnp.minimum(jnp.exp(gap_BT) - gap_BT - 1.0, _MAX_K3)",
     "return jnp.exp(gap_BT) - gap_BT - 1.0", "k3 without its cap"),
    ("rl/loss.py", 'checks.need(self.kl_estimator == "k1" or not self.kl_in_reward', "checks.need(True",
     "k3 in the reward"),
    ("rl/loss.py", "jnp.maximum(error_BT, near_error_BT)", "error_BT", "the value clip is off"),
    ("rl/loss.py", "0.0 if cfg.kl_in_reward else cfg.kl_coef if kl_coef is None else kl_coef",
     "0.0 if cfg.kl_in_reward else cfg.kl_coef", "the coefficient that adapts is not used"),
    ("rl/loss.py", "per = jnp.maximum(count_B, 1) if", "per = jnp.maximum(x_BT.shape[-1], 1) if",
     "a sequence's mean over its padding"),
    ("rl/loss.py", "- cfg.entropy_coef * entropy", "+ cfg.entropy_coef * entropy", "an entropy penalty"),
    # --- the learner --------------------------------------------------------------------------------------------
    ("learner/microbatch.py", "jnp.pad(flat(a)[:, :-1], ((0, 0), (1, 0)))", "flat(a)",
     "log-probabilities one token early"),
    ("types.py", "return self.sampled_BT & self.row_mask_B[:, None]", "return self.sampled_BT",
     "masked rows are trained on"),
    ("learner/step.py", "jax.lax.stop_gradient(logp) if first", "logp if first", "a ratio that is always 1"),
    ("learner/step.py", "kl_BT = state.kl_coef * jnp", "kl_BT = cfg.loss.kl_coef * jnp",
     "the coefficient that adapts is not used in the reward"),
    ("learner/step.py", "return state.replace(kl_coef=jnp.where(made, kl_coef, state.kl_coef)), metrics",
     "return state, metrics", "the coefficient does not adapt"),
    ("learner/step.py", "jnp.where(made, kl_coef, state.kl_coef)", "kl_coef",
     "a skipped update moves the coefficient that adapts"),
    ("learner/step.py", "finite = jnp.isfinite(loss_total) & jnp.isfinite(norm)", "finite = jnp.isfinite(loss_total)",
     "a gradient that overflows is followed"),
    ("learner/step.py", "finite &= jnp.isfinite(critic_norm)", "pass",
     "a critic's gradient that overflows is followed"),
    ("learner/optim.py", "new if chose(new) else jnp.where(made, new, old)", "new",
     "the schedule counts a skipped update"),
    ("learner/optim.py", "jnp.where(made, a, b.astype(a.dtype))", "a", "moments of a skipped update"),
    ("learner/optim.py", "count = jnp.where(made, count, state.count)", "pass",
     "Adam counts a skipped update"),
    ("learner/step.py", "critic=kept(optax.apply_updates(state.critic, updates), state.critic)",
     "critic=optax.apply_updates(state.critic, updates)", "the critic moves in a skipped update"),
    ("learner/step.py", "update=state.update + made", "update=state.update + 1", "a skipped update is counted"),
    ("run/bad.py", "return pooled.merge(good) | {name", "return whole | {name",
     "one update that is not finite fills the line"),
    ("run/bad.py", "if math.isfinite(norm) and norm > 0]", "if math.isfinite(norm)]",
     "steps without a gradient make the limit 0"),
    ("run/bad.py", "itertools.takewhile(failures, reversed(history))", "filter(failures, history)",
     "steps that are not in a row end a run"),
    ("run/bad.py", "odd_B = odd_B[arrays[\"order_B\"]]", "pass", "other trajectories than the odd ones are kept first"),
    ("run/record.py", "    if not bad.failures(line):\n", "    if True:\n",
     "one update that is not finite ends the run"),
    ("learner/step.py", "loss.value_loss(value, scored.value_old_BT,", "loss.value_loss(value, value,",
     "a value is clipped about itself"),
    ("learner/optim.py", "not (path[-1].key.startswith(\"norm\") or path[-1].key.endswith(\"_b\"))", "True",
     "norms and biases decay"),
    ("learner/step.py", "looks, total_B, batch.action_BT, batch.trained_BT, batch.row_mask_B, cfg.judge, value, kl_BT)",
     "looks, total_B, batch.action_BT, batch.trained_BT, batch.row_mask_B, cfg.judge, value)", "no KL in the reward"),
    ("learner/step.py", "pooled.mean_of(batch.answer_B, batch.answerable_B)", "_each_row(batch.answer_B)",
     "tasks without answers are wrong ones"),
    ("learner/step.py", "whole = None if moments[0] is None else advantage.pooled(moments)", "whole = None",
     "statistics of a minibatch, not of the batch"),
    ("learner/step.py", "lambda a, where: jax.device_put(a, where) if", "lambda a, where: a if",
     "moments that are offloaded stay on the device"),
    ("learner/optim.py", "return jax.tree.map(add, grads, trace), optax", "return trace, optax",
     "Muon's momentum looks back only"),
    ("learner/optim.py", "sharding.in_host(p.sharding) if host else p.sharding", "p.sharding",
     "nothing waits in the host's memory"),
    ("learner/optim.py", "p is None or p.shape != a.shape", "True", "moments are whole on every device"),
    ("model/remat.py", 'return policy(naming, *avals, name="attention")', "return policy(primitive, *avals, **params)",
     "cuDNN's forward pass runs again though it is kept"),
    ("learner/pooled.py", "top, bottom = values.sum(0)", "top, bottom = values.mean(0); bottom = max(bottom, 1.0)",
     "small denominators are rounded up"),
    # --- rollouts -----------------------------------------------------------------------------------------------
    ("rollout/sample.py", "jax.random.categorical(jax.random.fold_in(k, t), row)", "jax.random.categorical(k, row)",
     "the same noise for each token of a turn"),
    ("rollout/sample.py", "jax.random.fold_in(jax.random.fold_in(key, index), turn)", "jax.random.fold_in(key, index)",
     "the same noise for each turn"),
    ("rollout/sample.py", "pick(hidden_AD, writers.said_A + count)", "pick(hidden_AD, count)",
     "each segment of a turn has the first one's noise"),
    ("rollout/sample.py", "return t + 1, cache, pos_A + feed, hidden_AD", "return t + 1, cache, pos_A + 1, hidden_AD",
     "a row that has ended moves on"),
    ("rollout/turns.py", "if row.turn == policy.rollout.max_rounds:", "if row.turn > policy.rollout.max_rounds:",
     "a round too many"),
    ("rollout/turns.py", "said.called = not failed or parsed.is_call", "said.called = True",
     "every malformed turn is a refused call"),
    ("rollout/turns.py", "heard = np.concatenate([said.ids[-1:], heard]) if ended else heard", "heard = heard",
     "the end of a turn is never fed"),
    ("rollout/actions/zoom.py", "found = _BOX.search(text, *chars)", "found = _BOX.search(text)",
     "the box is looked for in the whole text"),
    ("rollout/pack.py", "b.pos_BXT[r, :, :n], _ = rope.positions(row, cfg.image_token, grids)",
     "b.pos_BXT[r, :, :n] = np.arange(n)", "plain positions"),
    ("rollout/pack.py", "mine[m][s][1 if i else 0][id(im)] = im", "mine[m][s][0][id(im)] = im",
     "shown images in the crops' bucket"),
    ("rollout/pack.py", "np.array([t.stop not in mask_stops for t in trajectories])",
     "np.ones(len(trajectories), bool)", "no row is masked"),
    ("rollout/dynamic.py", "draw(attempt) if attempt else tasks", "tasks",
     "further tries redraw the step's own batch"),
    ("rollout/dynamic.py", "of_try = jax.random.fold_in(key, _FURTHER + attempt) if attempt else key", "of_try = key",
     "further tries have the first one's luck"),
    ("rollout/chunks.py", "chunk.next_pos_A[a] = e.slot, r.start, n, r.next_pos",
     "chunk.next_pos_A[a] = e.slot, r.start, n, r.start + n", "positions count an image's tokens"),
    ("rollout/engine.py", "row.filled, row.next_pos = reply.start + len(reply.ids), reply.next_pos",
     "row.filled, row.next_pos = reply.start + len(reply.ids), row.next_pos", "positions stand still after a crop"),
    # --- asking -------------------------------------------------------------------------------------------------
    ("rollout/told.py", 'text = text.rstrip("\\ufffd")', "pass", "half a character is told, and then not the whole"),
    ("rollout/told.py", "number, self._told = row.turn, 0", "number = row.turn",
     "a turn is told from where the last was"),
    ("asking/desk.py", "        job.place(0)\n", "", "who waited is not told that it is their turn"),
    ("asking/desk.py", "      job.left.set()\n", "", "the policy goes on for who has left"),
    ("asking/site.py", "      self._check_origin()\n", "", "pages of other sites may ask"),
    ("asking/site.py", "  if found.netloc != host or found.username is not None:\n    return False\n", "",
     "a name behind a user's is taken for this host's"),
    ("asking/site.py", ", formats=_FORMATS)", ")", "whatever Pillow knows is opened"),
    ("asking/site.py", "images.decode(task.image, cfg.upload_pixels)", "Image.open(io.BytesIO(task.image))",
     "damaged pictures get into the queue"),
    ("asking/site.py", "      value = page_lib.visible(value)\n", "      pass\n", "terminal codes reach the page"),
    # --- the model ----------------------------------------------------------------------------------------------
    ("model/attention.py", " & (segment_BQ[:, None, :, None] == segment[:, None, None, :])", "",
     "joined trajectories see each other"),
    ("model/attention.py", "(i * block + jnp.arange(block))", "jnp.arange(block)",
     "each block of queries is the first"),
    ("model/cache.py", "seen_AQS = (slot_11S <= slot_AQ1) & (slot_11S >= i * width)",
     "seen_AQS = slot_11S >= i * width", "a token sees what comes after it"),
    ("model/cache.py", "end_A = jnp.where(write_AT < k.shape[3], slot_AT + 1, 0).max(1)", "end_A = slot_AT.max(1) + 1",
     "a kernel reads for padding, too"),
    ("model/cache_kernels.py", "jnp.where(row_A < B, jnp.clip(end_A, 0, S), 0)", "jnp.clip(end_A, 0, S)",
     "a row that does not exist is read as the last"),
    ("model/cache_kernels.py", "return layer[0], row[a], 0,", "return 0, row[a], 0,", "every layer reads the first"),
    ("model/cache_kernels.py", "ref[layer, row, head,", "ref[layer, a, head,",
     "a chunk row reads the cache row of its own number"),
    ("model/cache_kernels.py", "weight = jnp.exp(top - top.max(1, keepdims=True))", "weight = jnp.exp(top * 0)",
     "parts of a cache are added up as they are"),
    ("model/cache_kernels.py", "start = part * each", "start = part * steps", "parts of a cache leave slots out"),
    ("model/cache_kernels.py", "acc_QH * keep_Q1 + value_QH", "acc_QH + value_QH", "old values keep their weights"),
    ("model/cache.py", "total * keep + weight.sum(-1)", "total + weight.sum(-1)",
     "a softmax that forgets its rescaling"),
    ("model/head.py", "layers.logits(hidden_BTD, family.of(cfg).head(params)) / temperature",
     "layers.logits(hidden_BTD, family.of(cfg).head(params))", "no temperature in the policy"),
    ("model/head.py", "by_entropy[..., None] * p * (logp + entropy[..., None])",
     "by_entropy[..., None] * p * logp", "an entropy whose gradient forgets its own value"),
    ("rollout/pack.py", "loads[s] += sum(lengths[b] for b in unit)", "loads[s] += 1", "shards of unequal work"),
    ("rl/judge.py", "return jnp.zeros_like(out).at[order_B].set(out)", "return out", "advantages of other rows"),
    ("model/qwen2_5/text.py", "return rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v",
     "return rope.rotate(q, cos, sin), k, v", "keys are not rotated"),
    ("model/qwen2_5/vision.py", "attention.attend(cut(q), cut(k), cut(v), cut(window_IP),",
     "attention.attend(cut(q), cut(k), cut(v), cut(whole_IP),", "small images have no windows"),
    ("model/qwen2_5/vision.py", ", approximate=False)", ")", "the other GELU"),
    ("model/params.py", "np.ascontiguousarray(array.transpose(np.argsort(spec.perm)))",
     "np.ascontiguousarray(array.transpose(spec.perm))", "exported the wrong way round"),
    # --- data ---------------------------------------------------------------------------------------------------
    ("data/order.py", "SeedSequence([seed, number, attempt, stream])",
     "SeedSequence([seed + attempt * 2 ** 32, number, 0, stream])", "a further try is a later epoch"),
    ("data/order.py", "SeedSequence([seed, number, attempt, stream])", "SeedSequence([seed, 0, attempt, stream])",
     "every epoch in the same order"),
    ("data/mixture.py", "whole * part.weight + int", "int", "every round takes a set's same tasks"),
    ("data/mixture.py", "max(first, sorted_), max(last, sorted_), n, attempt, number)",
     "max(first, sorted_), max(last, sorted_), n, attempt, 0)", "sets of one size are walked through alike"),
    ("data/mixture.py", "1 - (below_N + upto_N)", "(below_N + upto_N)", "the hardest come first"),
    ("data/batches.py", "self._begin(step + 1, self._next)", "self._begin(step + 1, self._now)",
     "a stand-in waits for all of the next step"),
    ("data/sources/records.py", "x2, y2 = x1 + x2, y1 + y2", "x2, y2 = x1 + y2, y1 + x2",
     "widths and heights change places"),
    ("data/sources/records.py", "elif fitted.x1 < fitted.x2 and fitted.y1 < fitted.y2:", "else:",
     "boxes wholly outside are clipped to inverted ones"),
    ("data/sources/records.py", "else (width / stated_px[0], height / stated_px[1])", "else (1, 1)",
     "boxes for another size stay as they are"),
    ("data/sources/records.py", "content = [image_digest, question,", "content = [question,",
     "tasks on other images have the same provenance"),
    ("data/sources/stream.py", "not isinstance(found, (str, list, dict)) and", "False and",
     "a number that a chunk cuts is read in two"),
    ("data/sources/stream.py", "      yield from waiting\n", "", "broken lines before the first good one are lost"),
    ("data/sources/gqa.py", "int(end) if colon else int(first) + 1", "int(end) + 1 if colon else int(first) + 1",
     "ranges of words hold their last number"),
    ("data/sources/gqa.py", 'found["answer"] or found["fullAnswer"]', 'found["fullAnswer"]',
     "the answer's objects are not the rationale"),
    ("data/sources/visual_cot.py", '"textcap": "textvqa", ', "",
     "textcap's images are looked for in a folder of its own"),
    ("data/sources/visual_cot.py", '" ".join(question.lower().split())', "question",
     "the join minds capitals and blanks"),
    ("data/sources/textvqa.py", "str(uid) if isinstance(uid, int) else where", "str(uid or where)",
     "images' ids are taken for questions'"),
    ("data/sources/grit.py", "frame=records.UNIT, ", "", "shares of the image are taken for pixels"),
    ("data/sources/sets.py", 'rows_N[held_N == (split == "test")]', 'rows_N[held_N != (split == "test")]',
     "the sides of the split change places"),
    ("data/sources/set_files.py", "  (folder / INFO).unlink(missing_ok=True)\n", "",
     "a set that is half replaced looks whole"),
    ("data/curation/parts.py", "not is_known and number not in self._pending", "not is_known",
     "an id twice in one go is new both times"),
    ("data/curation/parts.py", 'return _ADDRESS.sub("", str(error))', "return str(error)",
     "rejects hold addresses of memory"),
    ("data/curation/facts.py", "top = max(top, y2)", "top = y2", "what boxes share is counted twice"),
    ("data/curation/facts.py", "edges = np.linspace(0, 64, distance + 2)", "edges = np.linspace(0, 64, distance + 1)",
     "near-duplicates whose differences fall into every stretch of bits are missed"),
    ("data/curation/rules.py", "task.coverage > cfg.most_coverage and not cfg.is_whole(task)",
     "task.coverage > cfg.most_coverage", "whole pictures go, whatever is set"),
    ("data/curation/rules.py", "key=lambda i: _rank(tasks[i], seed))", "key=lambda i: i)",
     "which duplicate stays depends on the order"),
    ("data/curation/rules.py", "if first < len(looks) <= second:", "if second >= len(looks):",
     "a benchmark's own duplicates are taken for tasks"),
    ("data/curation/band.py", "blind > cfg.most_without and not whole", "blind > cfg.most_without",
     "whole pictures are dropped as solved without zooming"),
    ("data/curation/funnel.py", "% n_shards].append(place)", "% (n_shards - 1)].append(place)",
     "a shard stays empty"),
    ("data/curation/funnel.py", "asker.about, dataclasses.asdict(job.policy)", "dataclasses.asdict(job.policy)",
     "the words of another policy are used"),
    ("data/curation/funnel.py", '== {"of": of, "n": len(lines)}', '["of"] == of', "a shard that is cut off is whole"),
    ("data/curation/policy.py", "tasks[i].provenance, name, k)", "tasks[i].provenance, name)",
     "all samples of a task have one seed"),
    ("rollout/remote.py", "prompt.plain(said.text.removesuffix(prompt.END))", "said.text.removesuffix(prompt.END)",
     "an endpoint can fake an image"),
    ("rollout/remote.py", 'if said.finish != "length":', "if True:", "a turn that was cut off counts as ended"),
    ("rollout/remote.py", "return original.resize(", "return original if True else original.resize(",
     "a picture is sent in another size than boxes are read in"),
    ("data/endpoint.py", "if e.code < 500 and e.code not in _AGAIN:", "if e.code not in _AGAIN:",
     "a server that is broken for now ends the program"),
    ("data/batches.py", "drawn = np.random.default_rng(seed).permutation(len(source))",
     "drawn = np.arange(len(source))", "the first of the file are held out"),
    ("data/images.py", "math.floor(region.x1)), max(0, math.floor(region.y1))",
     "round(region.x1)), max(0, round(region.y1))", "a crop begins inside its box"),
    # --- answers and benchmarks ---------------------------------------------------------------------------------
    ("data/official.py", "longest = max(len(answer), len(accepted))",
     "longest = max(len(answer.strip()), len(accepted))", "ANLS is divided by the length of what was tidied"),
    ("data/official.py", "return best if best >= ANLS_LEAST else 0.0", "return best if best > ANLS_LEAST else 0.0",
     "a similarity of exactly one half counts as none"),
    ("data/official.py", "said * min(1.0, (said - 1) / _PEOPLE)", "said * min(1.0, said / _PEOPLE)",
     "nobody is left out of those who said so"),
    ("data/answers.py", '"anls": official.anls_of_words', '"anls": official.anls', "padding with blanks is paid"),
    ("data/choice.py", "if index >= len(options) or _SEVERAL.match(rest):", "if index >= len(options):",
     "who names two options is taken at the first"),
    ("data/judge_model.py", "    raise Unreachable(f", "    return 'no'\n    raise Unreachable(f",
     "a dead endpoint says no"),
    ("data/answers.py", "traj.score = max(traj.score, score or 0.0)", "traj.score = score or 0.0",
     "a judge takes away what the rule gave"),
    ("run/verdicts.py", "self._fresh.append, final=True)", "self._fresh.append)",
     "a run that goes on is told something else"),
    ("rollout/dynamic.py", "answers.grade(found, judge)", "answers.grade(found)", "the judge is not asked"),
    ("rollout/pack.py", "np.array([t.worth for t in trajectories], np.float32)",
     "np.array([t.correct for t in trajectories], np.float32)", "an answer that is partly right is paid in full"),
    ("eval/outcome.py", "o.answerable * (o.correct if o.score is None else o.score)", "o.answerable * o.correct",
     "an answer that is partly right counts in full"),
    ("eval/benchmarks/hrbench.py", '"average": over(None)', '"average": rows_lib.mean(rows)',
     "HR-Bench's average is that of all rows"),
    ("eval/benchmarks/pope.py", '"No", "not", "no"}', '"No", "not", "no", "NO"}', "a rule that POPE has not"),
    ("eval/benchmarks/treebench.py", "for true in truth) / len(truth)", "for true in truth) / max(len(boxes), 1)",
     "boxes that hit nothing cost something"),
    ("eval/benchmarks/rows.py", "random.default_rng(word).permutation", "random.default_rng(seed).permutation",
     "all options in the same order"),
    ("eval/predictions.py", "return rows_lib.LETTERS[task.options.index(options[picked])]", "return text",
     "a letter means what it means in another order"),
    ("eval/predictions.py", "else given[split] == len(tasks[split]))", "else True)",
     "answers pair with labels of another release"),
    ("eval/asked.py", ' or "lost" in found[start + i]]', "]", "what an endpoint lost is not asked for again"),
    ("rollout/remote.py", "if self._gone_s or silent_s", "if silent_s", "each task waits for an endpoint that is gone"),
    ("rollout/remote.py", "if alone > 1:", "if alone:", "an endpoint that is just back loses what waited for it"),
    ("eval/asked.py", "    if keep + size > len(whole):\n", "    if keep >= len(whole):\n",
     "a chunk that was cut off is taken for whole"),
    # --- train.py -----------------------------------------------------------------------------------------------
    ("run/loop.py", 'sources.load(c, "test")', 'sources.load(c, "train")', "evaluation on the training split"),
    ("train.py", "key = jax.random.fold_in(run.root_key, step)", "key = jax.random.fold_in(run.root_key, 0)",
     "one sampling key for all steps"),
    ("train.py", "c.ppo.epochs * minibatches", "minibatches", "epochs are ignored"),
    ("train.py", "updates, limit = [], record.limit", "updates, limit = [], step_lib.NO_LIMIT", "spikes are followed"),
    ("run/loop.py", "    if self.record.stuck:\n", "    if False:\n", "a run that is stuck goes on"),
    ("train.py", "functools.partial(feed.further, step)", "lambda attempt: tasks",
     "further tries redraw the same batch"),
    ("train.py", "functools.partial(feed.further, step)", "functools.partial(feed.further, 0)",
     "further tries of every step are the first one's"),
    ("train.py", "functools.partial(_informative, p, step)", "functools.partial(_informative, p, 0)",
     "groups are judged by the first step's threshold"),
    # --- what is trained ----------------------------------------------------------------------------------------
    ("model/tuning.py", "return base + w.scale * jnp.tensordot(a, b, 1)", "return base + jnp.tensordot(a, b, 1)",
     "merged without alpha / rank"),
    ("model/tuning.py", "return self.alpha / self.rank", "return self.alpha", "alpha by itself"),
    ("model/tuning.py", '(None, *out_axes), "zeros", "B"', '(None, *out_axes), "normal", "B"',
     "fresh adapters are not the base"),
    ("model/tuning.py", "copy = lambda a: a if isinstance(a, jax.ShapeDtypeStruct) else a.copy()", "copy = lambda a: a",
     "an update takes the reference's arrays"),
    ("model/tuning.py", "if module in cfg.targets and not _is_frozen(path, cfg):", "if module in cfg.targets:",
     "a frozen tower gets adapters"),
    ("model/layers.py", "return dense(x, w.base, n_in) + w.scale * dense(dense(x, w.a, n_in), w.b)",
     "return dense(x, w.base, n_in) + dense(dense(x, w.a, n_in), w.b)", "adapters count alpha / rank times too little"),
    ("model/family.py", "return place(trained, dtype), place(frozen, cfg.compute_dtype)",
     "return place(trained, dtype), place(frozen, dtype)", "what is frozen is planned in the dtype of what is trained"),
    ("model/weights.py", "spec, _at(trained, path)[i])", "spec, _at(trained, path)[0])",
     "all layers' adapters are the first one's"),
    ("rollout/sample.py", "if a.dtype != cfg.compute_dtype or not", "if not", "rollouts in the parameters' dtype"),
    ("plan.py", "fits = peak + waiting <= topology.chip.memory_gib", "fits = peak <= topology.chip.memory_gib",
     "what waits beside a program counts for nothing"),
    ("run/programs.py", 'beside = c.ppo.minibatches * found["batch"]', 'beside = found["batch"]',
     "the other minibatches take no room"),
    # --- what it costs ------------------------------------------------------------------------------------------
    ("run/pace.py", "scored = (not alone) + (c.loss.kl_coef > 0)", "scored = 1 + (c.loss.kl_coef > 0)",
     "the only update's forward pass counts as scoring, too"),
    ("run/pace.py", "sum(n * (n + 1) // 2 for n in lengths)", "sum(n * n for n in lengths)",
     "tokens count for seeing what comes after them"),
    ("run/pace.py", "{id(image): math.prod(image.grid_hw)", "{(id(t), id(image)): math.prod(image.grid_hw)",
     "a group's picture counts once a trajectory"),
    ("run/goodput.py", 'found["useful" if event["step"] < kept else "redone"] += seconds', 'found["useful"] += seconds',
     "steps that are done again count each time"),
    ("run/goodput.py", "if path is not None and not (_content(path) or b\"\\n\").endswith(b\"\\n\"):", "if False:",
     "a start's first line is lost behind a line that was cut off"),
    ("train.py", 'clock.lap("startup", resumed=run.start)', 'clock.lap("startup")',
     "nobody knows which steps are done again"),
    # --- demonstrations -----------------------------------------------------------------------------------------
    ("learner/step.py", "nll = lambda found, here_BT, whole_BT=None: loss.aggregate(-found[0], here_BT,",
     "nll = lambda found, here_BT, whole_BT=None: loss.aggregate(-found[1], here_BT,", "entropy is imitated"),
    ("model/head.py", "*([-log_total] if spec.best else [])", "*([-top] if spec.best else [])",
     "every token is the likeliest"),
    ("run/lessons.py", "order.batch_indices(self._c.seed, step,", "order.batch_indices(self._c.seed, 0,",
     "every step learns the same demonstrations"),
    ("rollout/replay.py", "look.of if policy.prompt.zoom_into_crops else 0", "0",
     "a crop's box is always told as the picture's"),
    ("rollout/replay.py", "images.to_original(inside, r, wh)", "images.to_original(look.box, r, wh)",
     "a box of a crop reaches out of it"),
    ("rollout/replay.py", "    turn.logp = None\n", "    pass\n", "what is only looked at is learned"),
    ("data/recorded/mini_o3.py", "image = int(number)", "image = int(number) - 1", "an observation is the one before"),
    ("data/recorded/rollouts.py", "picture.size == (record[\"width\"], record[\"height\"])", "True",
     "a shrunk picture is taken for the original"),
    ("data/recorded/table.py", "found.reward < choice.least_reward", "found.reward <= choice.least_reward",
     "what earned just enough is left out"),
    # --- pages and comparisons -----------------------------------------------------------------------------------
    ("report/page.py", 'for c in "<>&', 'for c in ">&', "data can end its element"),
    ("report/page.py", "      for uri in list(self._pictures)[before:]:\n        del self._pictures[uri]\n", "",
     "pictures of what found no room stay"),
    ("report/page.py", "return visible(value)\n  if isinstance(value, float)",
     "return value\n  if isinstance(value, float)", "marks that reorder text reach the script"),
    ("report/trajectory.py", 'max(ious, default=0.0) if graded', 'max(ious, default=None) if graded',
     "who looks nowhere has no IoU"),
    ("report/gallery.py", 'found["trainer"] - logp', 'logp - found["trainer"]', "the gap the other way round"),
    ("run/record.py", "rows[order_B[i]]", "rows[i]", "another's figures where trajectories were dealt to shards"),
    ("run/record.py", "np.where(action_T >= 0, modulator", "np.where(action_T > 0, modulator",
     "the first action's tokens are not coloured"),
    ("report/benchmark.py", '*(ends.get(result["metric"]) or (None, None))', "*(next(iter(ends.values())) or ())",
     "an interval beside what it is not of"),
    ("eval/figures.py", "number[clusters[uid]] for uid in each.uids", "i for i, uid in enumerate(each.uids)",
     "intervals as if questions about one image were independent"),
    ("eval/figures.py", "- _samples(it.second, sampled)", "- it.second.value", "an interval that is not paired"),
    ("eval/benchmarks/rows.py", "most_common(1)[0][0]", "most_common()[-1][0]", "the rarest answer is the majority's"),
    ("report/benchmark.py", '(shown[i]["correct"], i)', 'i', "pictures for right answers, too, first"),
    ("eval/outcome.py", "min(1.0, 2 * tail / 2 ** n)", "min(1.0, tail / 2 ** n)", "a one-sided test"),
    ("eval/compare.py", "new[uid] - old[uid]} for uid in uids", "new[uid]} for uid in uids",
     "the second's mean as difference"),
    ("eval/compare.py", "if answers[0][uid] != answers[1][uid]]", "if False]", "other accepted answers are compared"),
)]


def plant(mutant: Mutant, tree: pathlib.Path) -> None:
  """Puts a bug into a copy of the repository.

  Raises:
    ValueError: the file does not hold the line exactly once.
  """
  file = tree / "virl_jax" / mutant.file
  text = file.read_text()
  if text.count(mutant.old) != 1:
    raise ValueError(f"{mutant.file} must hold {mutant.old!r} once. Received: {text.count(mutant.old)} times")
  file.write_text(text.replace(mutant.old, mutant.new))


def copy(to: pathlib.Path) -> None:
  """Copies all files of the repository that git does not ignore."""
  names = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True,
                         capture_output=True, text=True).stdout.splitlines()
  for name in names:
    if (ROOT / name).is_file():
      (to / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(ROOT / name, to / name)


def run(tests: list[str], tree: pathlib.Path, programs: str, timeout_s: float) -> tuple[int | None, str]:
  """The exit status of pytest (None if it ran out of time), and the first test that failed, if any."""
  env = dict(os.environ, PYTHONPATH=str(tree), PYTHONDONTWRITEBYTECODE="1", JAX_COMPILATION_CACHE_DIR=programs,
             JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
  try:
    done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=no",
                           *tests], cwd=tree, env=env, capture_output=True, text=True, timeout=timeout_s)
  except subprocess.TimeoutExpired:
    return None, f"more than {timeout_s:.0f} s"
  failed = [line.split(" - ")[0].split("::", 1)[-1] for line in done.stdout.splitlines()
            if line.startswith(("FAILED", "ERROR"))]
  return done.returncode, failed[0] if failed else ""


def main():
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument("--only", default="", help="bugs of the files whose name holds this")
  p.add_argument("--jobs", type=int, default=2)
  p.add_argument("--timeout-s", type=float, default=900.0, help="a bug whose tests take longer is caught: they hang")
  args = p.parse_args()
  chosen = [m for m in MUTANTS if args.only in m.file]
  began, rows, caught, survived = time.perf_counter(), {}, 0, []
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    programs = str(folder / "programs")

    def one(number: int, mutant: Mutant | None, tests: list[str]):
      tree = folder / str(number)
      copy(tree)
      if mutant is not None:
        plant(mutant, tree)
      try:
        return run(tests, tree, programs, args.timeout_s)
      finally:
        shutil.rmtree(tree)

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
      # Tests that fail without a bug would catch every bug; this run also fills the compilation cache for the others.
      whole = sorted({t for m in chosen for t in m.tests})
      for test, (status, failed) in zip(whole, pool.map(lambda t: one(10 ** 6 + whole.index(t), None, [t]), whole)):
        if status:
          sys.exit(f"{test} fails without any bug: {failed}")
      print(f"{len(whole)} test files pass as they are; {time.perf_counter() - began:.0f} s", flush=True)
      jobs, planting = {pool.submit(one, i, m, m.tests): i for i, m in enumerate(chosen)}, time.perf_counter()
      for done, job in enumerate(concurrent.futures.as_completed(jobs), start=1):
        i, (status, failed) = jobs[job], job.result()
        noticed = status is None or status == 1
        caught += noticed
        if status not in (None, 0, 1):
          sys.exit(f"pytest ended with {status} on {chosen[i]}")
        if not noticed:
          survived.append(f"{chosen[i].file}: {chosen[i].what}")
        rows[i] = [chosen[i].file, chosen[i].what, "caught" if noticed else "SURVIVED", failed]
        left = (time.perf_counter() - planting) / done * (len(jobs) - done)
        print(f"{done} of {len(jobs)}, about {left / 60:.0f} min left: {' | '.join(rows[i])}", flush=True)
  print("\n" + timing.table(["file", "bug", "", "by"], [rows[i] for i in range(len(chosen))]) + "\n")
  print(f"{caught} of {len(chosen)} caught in {(time.perf_counter() - began) / 60:.0f} minutes\n")
  print(timing.last_line(vars(args) | {"planted": len(chosen), "caught": caught, "survived": survived}, ()))


if __name__ == "__main__":
  main()
