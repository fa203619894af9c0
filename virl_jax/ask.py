"""Asks a policy about a picture, and shows where it looks; or serves a page on which to ask.

    python -m virl_jax.ask --model=runs/v7b --image=kitchen.jpg --question='What is on the shelf?' --out=PAGE.html
    python -m virl_jax.ask --model=HF_DIR --image=a.png --question='Which colour?' --options=red,blue
    python -m virl_jax.ask --model=runs/v7b --serve --port=7860

The reasoning is printed while it is sampled; each zoom says which region it is about, in pixels of the original, and
what came back.  Standard error says what is waited for until then.  --out is a page with the picture, its boxes, the
crops and all words, which needs nothing beside it.

--model and --config are those of `evaluate`: a run's folder, whose own configuration says how it is asked, or an HF
folder.  --serve is for this machine alone unless --host says otherwise; docs/ask.md has what it refuses.
"""

from __future__ import annotations

if __name__ == "__main__":
  from virl_jax.run import signals
  signals.install()

if __name__ == "__main__":
  from virl_jax.run import progress
  progress.note("starting")  # what is imported takes seconds

from collections.abc import Callable
import dataclasses
import sys
import time

from absl import app
from absl import flags
import jax
from ml_collections import config_flags

from virl_jax import config as config_lib
from virl_jax import types
from virl_jax.asking import desk as desk_lib
from virl_jax.asking import site
from virl_jax.data import images
from virl_jax.report import gallery
from virl_jax.report import page as page_lib
from virl_jax.rollout import engine
from virl_jax.rollout import sample
from virl_jax.rollout import told
from virl_jax.rollout import turns
from virl_jax.run import files
from virl_jax.run import progress
from virl_jax.run import setup

_PAGE_ROOM = 32_000_000  # characters of a page: more than one trajectory can have
_SEGMENT_TOKENS = 8  # that are sampled between two looks at what there is to tell


@dataclasses.dataclass(frozen=True)
class Asked:
  """A policy that answers one question at a time.

  Attributes:
    policy: everything but the parameters.
    params: as rollouts want them.
    temperature: 0 is greedy.
    seed: of the sampling.
  """

  policy: turns.Policy
  params: dict
  temperature: float = 0.0
  seed: int = 0

  def __call__(self, task: types.Task, tell: Callable) -> types.Trajectory:
    """Asks a question.

    Args:
      task: its picture as bytes or decoded.
      tell: called with what happens; see `told`.

    Raises:
      ValueError: the picture cannot be decoded, or the question is beyond a budget.
    """
    return engine.run(self.policy, self.params, [task], jax.random.key(self.seed), 1, self.temperature,
                      told.Protocol(tell))[0][0]


def load(model: str, c: config_lib.ConfigDict | None = None, temperature: float = 0.0, seed: int = 0) -> Asked:
  """The policy of a run's folder, an HF folder, or "@tiny".

  Args:
    model, c: as `setup.of_policy` takes them.
    temperature, seed: of the sampling.

  Raises:
    ValueError: there is none, or the configuration does not fit.
  """
  _, loaded, p = setup.of_policy(model, c)
  how = dataclasses.replace(p.policy.engine, slots=1, threads=1,
                            segment_tokens=min(_SEGMENT_TOKENS, p.policy.engine.segment_tokens))
  return Asked(dataclasses.replace(p.policy, engine=how), sample.weights(loaded.params, p.policy.model, p.policy.mesh),
               temperature, seed)


def ask(asked: Callable, task: types.Task, out: str | None = None, stream=None) -> types.Trajectory:
  """Asks a question, prints what happens, and writes the page.

  Args:
    asked: such as `load` gives.
    task: its picture decoded.
    out: path of a page, or None.
    stream: where to print; None is standard output.

  Raises:
    ValueError: the question is beyond a budget, or the page cannot be written.
  """
  traj = asked(task, Printer(stream or sys.stdout))
  if out:
    files.write_text(files.path(out), page(traj))
  return traj


def page(traj: types.Trajectory) -> str:
  """One trajectory as a page that needs nothing beside it, in the report's style; its task's picture is decoded."""
  shown = page_lib.Shown(_PAGE_ROOM)
  shown.add(gallery.entry(traj, traj.task.image, None, None, None, None, None, None), "")
  looks = len(traj.regions)
  facts = ["no look" if not looks else "one look" if looks == 1 else f"{looks} looks", "not graded"]
  values = {"title": "A question about a picture", "facts": facts}
  return page_lib.render("asked.html.j2", values, shown.data([""], False))


class Printer:
  """Prints what happens as it happens; nothing that a policy wrote moves the cursor."""

  def __init__(self, stream):
    self._stream, self._looks, self._midline = stream, 0, False

  def __call__(self, event) -> None:
    match event:
      case told.Began():
        self._size = event.picture.size
        self._line(f"{_by(self._size)} px, shown as {_by(event.shown)} px")
      case told.Said():
        text = page_lib.visible(event.text)
        self._stream.write(text)
        self._midline = not text.endswith("\n")
      case told.Looked():
        self._looks += 1
        self._line(f"[look {self._looks}: {self._about(event)}]")
      case told.Refused():
        self._line(f"[refused: {page_lib.visible(event.error)}]")
      case told.Ended():
        why = event.stop.value.replace("_", " ") + (f": {event.error}" if event.error else "")
        self._line(f"no answer ({page_lib.visible(why)})" if event.answer is None else
                   f"answer: {page_lib.visible(event.answer)}")
    self._stream.flush()

  def _about(self, looked: told.Looked) -> str:
    parts = []
    if looked.region is not None:
      parts.append(f"{_box(looked.region)} of {_by(self._size)} px")
    if looked.cut is not None:
      parts.append(f"back came {_box(looked.cut)} as {_by(looked.shown)} px")
    if looked.text:
      parts.append(page_lib.visible(looked.text))
    return "; ".join(parts)

  def _line(self, text: str) -> None:
    self._stream.write(("\n" if self._midline else "") + text + "\n")
    self._midline = False


def _by(size: tuple[int, int]) -> str:
  return f"{size[0]} x {size[1]}"


def _box(box: types.Box) -> str:
  x1, y1, x2, y2 = (f"{round(v, 1):g}" for v in box)
  return f"x {x1} to {x2}, y {y1} to {y2}"


def serve(asked: Asked, model: str, cfg: site.Config, waiting: int = 16) -> None:
  """Serves the page until the process ends.

  Args:
    asked: the policy.
    model: what it is called on the page.
    cfg: address and limits.
    waiting: questions at a time, the one that is answered included.

  Raises:
    ValueError: the address cannot be used.
  """
  most = min(cfg.upload_pixels, asked.policy.image.decode_max_pixels)
  server = site.make(desk_lib.Desk(asked, waiting), lambda task: turns.check(asked.policy, task),
                     {"model": model, "at most": f"{asked.policy.rollout.max_rounds} looks"},
                     dataclasses.replace(cfg, upload_pixels=most))
  host, port = server.server_address[:2]
  print(f"http://{f'[{host}]' if ':' in host else host}:{port}/ (Ctrl-C ends it)", flush=True)
  with server:
    server.serve_forever()


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the command's flags; not on import, because other commands have flags of the same names."""
  text = lambda name, words: flags.DEFINE_string(name, None, words, flag_values=values)
  number = lambda name, default, least, words: flags.DEFINE_integer(name, default, words, least, flag_values=values)
  text("model", "A run's folder, or an HF folder.")
  text("image", "A picture's file.")
  text("question", "What to ask about it.")
  flags.DEFINE_list("options", [], "Options that the answer must be one of.", flag_values=values)
  text("out", "Path of a page with the picture and what the policy did.")
  flags.DEFINE_bool("serve", False, "Serve a page on which to ask questions.", flag_values=values)
  flags.DEFINE_string("host", site.Config.host, "Address to serve at; 0.0.0.0 for all who reach this machine.",
                      flag_values=values)
  number("port", site.Config.port, 0, "Port to serve at; 0 for any that is free.")
  flags.DEFINE_list("names", [], "Further host names by which browsers reach the page, such as a proxy's.",
                    flag_values=values)
  number("waiting", 16, 1, "Most questions in the queue, with the one that is being answered.")
  number("upload_mb", site.Config.upload_bytes // 10 ** 6, 1, "Largest upload, in megabytes.")
  number("upload_megapixels", site.Config.upload_pixels // 10 ** 6, 1, "Largest picture, in megapixels.")
  flags.DEFINE_float("temperature", 0.0, "Sampling temperature; 0 is greedy.", 0.0, flag_values=values)
  number("seed", 0, 0, "Seed of the sampling.")
  config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)


def main(argv):
  args = flags.FLAGS
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  if not args.model or args.serve == bool(args.image or args.question or args.options or args.out):
    raise app.UsageError("--model=DIR and either --image=FILE --question=TEXT or --serve are needed")
  if not args.serve and not (args.image and args.question):
    raise app.UsageError("--image=FILE and --question=TEXT go together")
  setup.begin()
  with setup.told():
    if args.serve:
      cfg = site.Config(args.host, args.port, tuple(args.names), args.upload_mb * 10 ** 6,
                        args.upload_megapixels * 10 ** 6)
      serve(_loaded(args), args.model, cfg, args.waiting)
      return
    picture = images.decode(args.image)  # before what takes long
    task = types.Task(args.image, picture, args.question, options=tuple(args.options) or None, kind="asked")
    ask(_loaded(args), task, args.out)


def _loaded(args) -> Asked:
  """The policy that the flags name; says on standard error what is waited for."""
  progress.note(f"loading {args.model}")
  began = time.perf_counter()
  asked = load(args.model, args.config, args.temperature, args.seed)
  progress.note(f"loaded after {time.perf_counter() - began:.0f} s; the first answer about a picture of some size "
                "waits for its programs, which are compiled unless the cache has them")
  return asked


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=setup.parse)
