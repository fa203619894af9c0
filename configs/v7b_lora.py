"""ViRL on Qwen2.5-VL-7B-Instruct with low-rank adapters: one GPU of 80 GB.

    hf download Qwen/Qwen2.5-VL-7B-Instruct --local-dir=weights/Qwen2.5-VL-7B-Instruct
    python -m virl_jax.plan --config=configs/v7b_lora.py --topology=h100:1
    python -m virl_jax.train --config=configs/v7b_lora.py --config.data.path=RECORDS.jsonl --workdir=runs/v7b_lora
    python -m virl_jax.export --workdir=runs/v7b_lora --adapters=ADAPTERS --out=HF_DIR

Only what differs from configs/v7b.py is here; that file's labels say where its numbers are from, [ours] is chosen here.
Never run end to end by us: no machine we have holds it.  docs/scaling.md has what it takes, as compiled.
"""

import pathlib
import runpy


def get_config():
  c = runpy.run_path(str(pathlib.Path(__file__).with_name("v7b.py")))["get_config"]()
  c.lora.rank, c.lora.alpha = 64, 64.0  # [ours]
  c.model.freeze_vision = True          # [ours; EasyR1 has it as an option]
  c.optim.learning_rate = 1e-5          # ten times full training's [ours, after Thinking Machines, LoRA Without Regret]
  c.optim.weight_decay = 0.0            # adapters begin at zero, and decay would draw them back to it [ours]
  c.rollout.prompts = 32                # 256 trajectories a step, for one device [ours]
  c.ppo.minibatches = 2                 # [ours]
  c.engine.slots = 32                   # 28 GiB of cache [ours]
  c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, -1, 1
  return c
