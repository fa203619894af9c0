"""Which benchmarks there are, by the names that --benchmark takes."""

from virl_jax.eval.benchmarks import docvqa
from virl_jax.eval.benchmarks import hrbench
from virl_jax.eval.benchmarks import infographicsvqa
from virl_jax.eval.benchmarks import mme_realworld
from virl_jax.eval.benchmarks import needle
from virl_jax.eval.benchmarks import pope
from virl_jax.eval.benchmarks import records
from virl_jax.eval.benchmarks import textvqa
from virl_jax.eval.benchmarks import treebench
from virl_jax.eval.benchmarks import visualprobe
from virl_jax.eval.benchmarks import vstar

BENCHMARKS = {
    "vstar": vstar,
    "hrbench4k": hrbench,
    "hrbench8k": hrbench,
    "pope": pope,
    "textvqa": textvqa,
    "docvqa": docvqa,
    "infographicsvqa": infographicsvqa,
    "mme_realworld": mme_realworld,
    "mme_realworld_lite": mme_realworld,
    "treebench": treebench,
    "visualprobe": visualprobe,
    "records": records,
    "needle": needle,
}
