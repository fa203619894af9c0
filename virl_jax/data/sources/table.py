"""The sources, by the names that commands give them.

A source is a module with NAME, SPLITS, LICENCE, WANTED (what must be in its raw folder), files(root, split) and
read(root, split); those in `JOINED` also take boxes_from, the raw folder of Visual-CoT.
"""

from virl_jax.data.sources import deepeyes
from virl_jax.data.sources import docvqa
from virl_jax.data.sources import gqa
from virl_jax.data.sources import grit
from virl_jax.data.sources import hf_parquet
from virl_jax.data.sources import infographicsvqa
from virl_jax.data.sources import lines
from virl_jax.data.sources import mini_o3
from virl_jax.data.sources import pixel_reasoner
from virl_jax.data.sources import textvqa
from virl_jax.data.sources import treevgr
from virl_jax.data.sources import visual7w
from virl_jax.data.sources import visual_cot

SOURCES = {module.NAME: module for module in (
    visual_cot, gqa, textvqa, visual7w, infographicsvqa, docvqa, grit, deepeyes, mini_o3, pixel_reasoner, treevgr,
    hf_parquet, lines)}
JOINED = ("textvqa", "infographicsvqa", "docvqa")
