"""The folder that a run owns: which run's it is, which process uses it, and what its figures are made with.

It may lie in a bucket: see `run/files.py`.  Of several processes the first writes it, and all must see it.
"""

from __future__ import annotations

from collections.abc import Collection
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform

from etils import epath
import jax

from virl_jax import config as config_lib
from virl_jax.run import files
from virl_jax.run import hosts
from virl_jax.run import signals

# What a run can never change, and why; a section stands for all its keys.
_FIXED = {"model.path": "the checkpoints are of that model",
          "model.dtype": "the checkpoints hold parameters of that type",
          "model.freeze_vision": "the checkpoints hold what is trained",
          "lora": "the checkpoints hold adapters of that kind",
          "seed": "it orders the data",
          "data": "evaluations before and after must be about the same tasks",
          "data.weights": "they order the data",
          "data.easy_first_epochs": "it orders the data",
          "data.easy_first_width": "it orders the data",
          "eval": "evaluations before and after must be made in the same way"}


_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "virl_jax")
_LOCK = ".lock"


@dataclasses.dataclass
class Claimed:
  """A workdir that no other process uses until this is closed, or this process ends in any way.

  Attributes:
    folder: the workdir.
    changed: knobs that were changed on purpose at this start, key -> [old, new].
  """

  folder: epath.Path
  changed: dict[str, list]
  _lock: files.Lock
  _signals: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)

  def __enter__(self) -> Claimed:
    self._signals.enter_context(signals.closing(self.close))  # a bucket's lock does not end with the process
    return self

  def __exit__(self, *_) -> None:
    self.close()
    self._signals.close()

  def close(self) -> None:
    """Leaves the folder to others."""
    self._lock.close()


def claim(path: str, c: config_lib.ConfigDict, source=None, changes: bool | None = None,
          free: Collection[str] | None = None) -> Claimed:
  """Makes the folder, or makes sure that it belongs to this configuration and data, and locks it.

  Args:
    path: the workdir.
    c: the run's configuration.
    source: the run's data, with `fingerprint` and `describe`; None if it has none.
    changes: whether knobs that belong to the run may differ from what the folder holds, except for those that a run can
      never change; None where the command has no such option.
    free: dotted keys that may always differ; None for `config.free_keys()`.

  Raises:
    ValueError: the folder is another run's, another process is using it, or it can't be made; nothing in it is touched.
  """
  if source is not None and hosts.several():
    hosts.same("data", {"fingerprint": source.fingerprint(), "content": source.describe()})
  held: list[Claimed] = []

  def hold() -> tuple[dict[str, list], str]:
    held.append(_claim(path, c, source, changes, free))
    return held[0].changed, files.read_text(held[0].folder / _LOCK)

  changed, said = hosts.first(hold)
  lock = files.path(path) / _LOCK
  if not files.is_file(lock) or files.read_text(lock) != said:
    held and held[0].close()
    raise ValueError(f"--workdir must be a folder that all processes see. Received: {path}, where process "
                     f"{jax.process_index()} on {platform.node()} does not find what process 0 has put there")
  return held[0] if held else Claimed(lock.parent, changed, open(os.devnull))


def alike(c: config_lib.ConfigDict) -> None:
  """Makes sure that all processes were given the same configuration, and run the same code.

  Raises:
    ValueError: names the first difference.
  """
  if not hosts.several():  # spares a single process reading all files of the package, see `_code`
    return
  hosts.same("configuration", config_lib.flat(json.loads(config_lib.to_json(c))))
  hosts.same("code", {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version(),
                                                                      "content of virl_jax": _code()})


def _code() -> str:
  """A digest of this package's files."""
  root, digest = pathlib.Path(__file__).parents[1], hashlib.blake2b(digest_size=8)
  for file in sorted(root.rglob("*.py")):
    digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
  return digest.hexdigest()


def _claim(path: str, c: config_lib.ConfigDict, source, changes: bool | None, free: Collection[str] | None) -> Claimed:
  """`claim` on one process."""
  folder = files.path(path)
  free = config_lib.free_keys() if free is None else free
  try:
    _compare(folder, c, source, changes, free)  # before a lock is put into another run's folder
    files.make(folder / "rollouts")
    lock = files.lock(folder / _LOCK, _lost)
  except files.Held as e:
    raise ValueError(f"{folder} is in use by {e}; stop it or use another --workdir") from None
  except OSError as e:
    raise ValueError(f"--workdir must be a folder that can be made and written to. Received: {path} ({e})") from e
  try:
    changed = _compare(folder, c, source, changes, free)
    files.write_text(folder / "config.json", config_lib.to_json(c))
    if source is not None:
      data = {"fingerprint": source.fingerprint(), "was": source.describe()}
      files.write_text(folder / "data.json", json.dumps(data) + "\n")
  except BaseException:
    lock.close()
    raise
  return Claimed(folder, changed, lock)


def config(path: str | os.PathLike) -> config_lib.ConfigDict:
  """The configuration of a run, under today's names whatever version made it.

  Raises:
    ValueError: the folder holds no run.
  """
  file = files.path(path) / "config.json"
  if not files.is_file(file):
    raise ValueError(f"--workdir must be a run's folder, with a config.json. Received: {path}")
  return config_lib.from_json(files.read_text(file), str(file))


def header(c: config_lib.ConfigDict, changed: dict[str, list] | None = None) -> dict:
  """What a run's figures are made with, for the first line of metrics.jsonl; no clock, so that runs can be compared.

  Args:
    c: the run's configuration.
    changed: see `Claimed`.

  Returns:
    "config", the whole configuration; "versions" of Python and of packages; "device", its kind; "devices", how many;
    and "changed", if anything was changed.
  """
  return {"config": json.loads(config_lib.to_json(c)),
          "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
          "device": jax.devices()[0].device_kind, "devices": jax.device_count(),
          **({"changed": changed} if changed else {})}


def _compare(folder: epath.Path, c: config_lib.ConfigDict, source, changes: bool | None, free: Collection[str]
             ) -> dict[str, list]:
  """The knobs in which a configuration differs from the folder's, if that is allowed: key -> [old, new].

  Raises:
    ValueError: the folder is another run's.
  """
  file = folder / "config.json"
  if not files.is_file(file):
    if any(files.exists(folder / name) for name in ("metrics.jsonl", "checkpoints")):
      raise ValueError(f"{folder} holds a run but no config.json that says whose; use another --workdir")
    return {}
  try:
    old, new = (config_lib.flat(json.loads(config_lib.to_json(k))) for k in (config(folder), c))
  except ValueError as e:
    raise ValueError(f"{e}; use another --workdir") from e
  known = fingerprint(folder)
  same_data = source is not None and known is not None and source.fingerprint() == known["fingerprint"]
  differ = {k: [old[k], new.get(k)] for k in sorted(old) if k not in free and old[k] != new.get(k)
            and not (k in ("data.path", "data.eval_path") and same_data)}
  fixed = {k: why for k in differ for key, why in _FIXED.items() if k == key or k.startswith(f"{key}.")}
  if differ and (fixed or not changes):
    told = [f"{k}: {was!r} there, {now!r} now" + (f" ({fixed[k]})" if k in fixed and changes is not None else "")
            for k, (was, now) in sorted(differ.items(), key=lambda item: item[0] not in fixed)]
    more = f"; {len(told) - 5} more" if len(told) > 5 else ""
    or_else = ", or --resume-with-changes to go on with these" if changes is False and not fixed else ""
    raise ValueError(f"{folder} holds a run with another configuration ({'; '.join(told[:5])}{more}); use another "
                     f"--workdir{or_else}")
  if source is not None and known is not None and not same_data:
    raise ValueError(f"{folder} holds a run on other data: what config.data.path = {c.data.path!r} or "
                     f"config.sft.data = {c.sft.data!r} names has changed since. "
                     f"Then: {known['was']}. Now: {source.describe()}. Use another --workdir")
  return differ


def fingerprint(folder: epath.Path) -> dict | None:
  """What a run's data.json holds: "fingerprint", and "was", the data's description; None for a folder without the file,
  as older versions left it.

  Raises:
    ValueError: it holds something else.
  """
  file = folder / "data.json"
  if not files.is_file(file):
    return None
  try:
    found = json.loads(files.read_text(file))
    return {"fingerprint": found["fingerprint"], "was": found["was"]}
  except (ValueError, KeyError, TypeError) as e:
    raise ValueError(f"{file} must hold a fingerprint as a run writes it ({e}); use another --workdir") from e


def _lost(message: str) -> None:
  """Ends this process: another one has taken its workdir, and it must not write there any more."""
  print(f"error: {message}", flush=True)
  hosts.fail(message)
  os._exit(1)


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:  # virl_jax, run from a checkout
    return "not installed"
