"""The arms of the experiments in docs/results*.md: the tiny run with one thing changed in each.

    python -m virl_jax.train --config=configs/ablations/arms.py:outcome_only --workdir=runs/outcome_only

An arm is a name and what it changes in configs/tiny.py.  Everything else, such as the learning rate (except for
adapters) and the number of steps, is the same for all: nothing is tuned for one arm alone.
"""

import pathlib
import runpy

_OUTCOME = {"reward.w_fidelity": 0.0, "credit.kind": "none"}
_GUESSABLE = {"data.needle.guessable": 0.75}
# Bases that some arms start from, with their flags.  benchmarks/reproduce.py makes them, and so does
# python -m virl_jax.warmstart --config=configs/tiny.py <FLAGS> --out=runs/NAME
BASES = {
    # Answers three questions in ten without looking, guessing from colours.  The tiny base never does, so that
    # outcome-only training could not fall back to it.
    "runs/guesser": ("--config.warmstart.base=@tiny", "--config.warmstart.steps=200",
                     "--config.warmstart.p_direct=0.3"),
    # Counts the objects that have a mark; the tiny base was never asked to.  With zooms as clumsy as that one's, it
    # would read so few marks that guessing pays better than looking.
    "runs/counter": ("--config.warmstart.base=@tiny", "--config.warmstart.steps=500", "--config.warmstart.p_count=1.0",
                     "--config.warmstart.p_clumsy=0.3", "--config.warmstart.clumsy_learning_rate=1e-3",
                     "--config.data.needle.objects=(7,8)"),
}
_GUESSER = {"model.path": "runs/guesser"}
# Sets that benchmarks/unfiltered.py makes with that base, before and after curation, with the same held-out tasks.
_SET = {name: _GUESSER | {"data.source": "set", "data.path": f"runs/sets/{name}",
                          "data.eval_path": "runs/sets/held_out"} for name in ("unfiltered", "curated")}
# Room for rounds beyond six: a tool turn and the turn after it take at most 60 tokens.
_LONG = {"rollout.max_rounds": 8, "rollout.max_total_tokens": 640}
# Tasks that need seven or eight zooms.  A trajectory is three times as long: fewer of them a step, and fewer steps.
_COUNT = {"model.path": "runs/counter", "data.needle.families": ("count_pattern",), "data.needle.objects": (7, 8),
          "rollout.max_rounds": 9, "rollout.max_total_tokens": 512, "rollout.prompts": 8, "steps": 25}

ARMS = {
    # The method, and the method without parts of it.
    "full": {},
    "fidelity": {"credit.kind": "none"},
    "outcome_only": _OUTCOME,
    # The threshold.
    **{f"h0_{h0}": {"reward.h0": h0} for h0 in (0.2, 0.3, 0.5)},
    # The modulators: h_good, h_bad.
    **{f"h_{good}_{bad}": {"credit.h_good": good, "credit.h_bad": bad}
       for good, bad in ((1.25, 0.75), (1.5, 0.0), (2.0, 0.5), (2.0, 0.0))},
    # The penalty of redundant zooms.
    **{f"rho_{rho}": {"reward.rho": rho} for rho in (0.0, 1.0)},
    # Unfiltered data: three quarters of the training pictures can be answered without a zoom; no held-out one can.
    "filtered_full": _GUESSER,
    "filtered_outcome_only": _GUESSER | _OUTCOME,
    "guessable_full": _GUESSER | _GUESSABLE,
    "guessable_outcome_only": _GUESSER | _GUESSABLE | _OUTCOME,
    "guessable_shipped_base": _GUESSABLE | _OUTCOME,
    # The same question through the pipeline: a set as it was built, and what curation leaves of it.
    "unfiltered": _SET["unfiltered"],
    "curated": _SET["curated"],
    "unfiltered_outcome_only": _SET["unfiltered"] | _OUTCOME,
    "curated_outcome_only": _SET["curated"] | _OUTCOME,
    # Room for more than six rounds, with each way to average their rewards.
    "long_mean": _LONG,
    **{f"long_{a}": _LONG | {"reward.average": a} for a in ("sum", "discounted", "best")},
    # The same where tasks need more than six.
    "count_mean": _COUNT,
    **{f"count_{a}": _COUNT | {"reward.average": a} for a in ("sum", "discounted", "best")},
    "count_outcome_only": _COUNT | _OUTCOME,
    # Adapters in place of the weights, at five times the learning rate, the only one that was tried: they need larger
    # steps.
    "lora": {"lora.rank": 16, "lora.alpha": 32.0, "optim.learning_rate": 1e-3},
}


def get_config(arm: str = "full"):
  if arm not in ARMS:
    raise ValueError(f"the arm must be one of {', '.join(ARMS)}. Received: {arm!r}")
  c = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "tiny.py"))["get_config"]()
  c.update_from_flattened_dict(ARMS[arm])
  return c
