"""Makes the report of a run again, or one page of two runs side by side.

    python -m virl_jax.report runs/a
    python -m virl_jax.report runs/a runs/b --out=a_and_b.html

A run writes its own report when it ends; this command makes one at any time, even while the run goes on.  The page of
two runs has curves, evaluations (with the paired difference, if both were asked the same tasks) and trajectories of
both, and the knobs in which their configurations differ.
"""

from __future__ import annotations

from absl import app
from absl import flags

from virl_jax.report import html


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the command's flags; not on import, because other commands have flags of the same names."""
  flags.DEFINE_string("out", None, "The page; by default report.html in the run's folder.", flag_values=values)


def main(argv):
  if not 2 <= len(argv) <= 3:
    raise app.UsageError("a run's folder is needed, or two")
  if len(argv) == 3 and not flags.FLAGS.out:
    raise app.UsageError("--out=PAGE.html is needed for two runs")
  try:
    print(html.write(argv[1], argv[2] if len(argv) == 3 else None, flags.FLAGS.out))
  except ValueError as e:
    raise SystemExit(f"error: {e}") from None


if __name__ == "__main__":
  define_flags()
  app.run(main)
