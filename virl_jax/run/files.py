"""The files of a workdir, which is a folder or lies in a bucket (gs://BUCKET/DIR): only this module knows which.

A disk can append, rename and lock; an object store can't, but it replaces an object whole or not at all, and only if
nobody else did so first (Cloud Storage's if-generation-match).  What is left if the process is killed meanwhile:

                 on a disk                                     in a bucket
    write_bytes  the old content or the new (a rename)         the old content or the new (one upload)
    append       perhaps a last line that is cut off           all with the line or without it (the whole is uploaded)
    move         the old folder or the new (a rename)          the old folder; or the new one and a part of the old
    lock         no lock: the kernel releases it               a lease, which expires `LEASE_S` after its last renewal

In a bucket, `move` copies, and then deletes, files of the folder itself first: a checkpoint that is left in part lacks
Orbax's commit_success.txt, without which it is none.

Paths are etils' `epath.Path`, which Orbax takes too; a `pathlib.Path` would turn gs:// into gs:/.  Buckets are read and
written through gcsfs, as epath does; the lease needs google-cloud-storage, which gcsfs depends on.  TensorFlow is not
needed.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import datetime
import errno
import fcntl
import functools
import logging
import os
import pathlib
import platform
import re
import shutil
import threading
import time
from typing import BinaryIO
from typing import Protocol
import uuid

from etils import epath

_BUCKETS = "gs://"
_OTHER = re.compile(r"(?!gs://[a-z0-9])([A-Za-z][\w+.-]*://|gs:/)")  # addresses of other kinds, or malformed ones
RENEW_S = 10.0  # how often a lease is renewed
LEASE_S = 60.0  # a lease that was not renewed for so long can be taken over
_PATIENCE_S = 5.0  # how long the release of a lease waits for a renewal that has begun
_BLOCK_BYTES = 1 << 24  # how much of a large object is read at a time


class Lock(Protocol):
  """What `lock` returns: held until it is closed, or the process ends."""

  def close(self) -> None: ...


def path(where: str | os.PathLike) -> epath.Path:
  """The path that a user or a caller means.

  Raises:
    ValueError: it is an address of another kind than gs://BUCKET, or the packages for these are not installed.
  """
  text = os.fspath(where)
  if not _OTHER.match(text):
    found = epath.Path(where)
    if is_local(found) or _store() and not _OTHER.match(os.fspath(found)):  # epath takes /s3/BUCKET for s3://BUCKET
      return found
  raise ValueError(f"a workdir must be a folder, or gs://BUCKET/DIR. Received: {text}")


def is_local(path: os.PathLike) -> bool:
  """Whether it lies on a disk."""
  return "://" not in os.fspath(path)


def absolute(path: epath.Path) -> epath.Path:
  """The path in a form that means the same in any working directory."""
  return epath.Path(os.path.abspath(path)) if is_local(path) else path


# --- a file ------------------------------------------------------------------------------------------------------


def read_bytes(path: epath.Path) -> bytes:
  """A file's content.

  Raises:
    OSError: it can't be read; `FileNotFoundError` if there is none.
  """
  if is_local(path):
    with open(path, "rb") as file:
      return file.read()
  with _as_os_errors(path):
    return _store().cat_file(os.fspath(path))


def read_text(path: epath.Path) -> str:
  """A file's content, UTF-8; see `read_bytes`."""
  return read_bytes(path).decode()


def opened(path: epath.Path) -> contextlib.AbstractContextManager[BinaryIO]:
  """An open file, for reading in pieces, however large it is."""
  if is_local(path):
    return open(path, "rb")
  with _as_os_errors(path):
    return _store().open(os.fspath(path), "rb", block_size=_BLOCK_BYTES, cache_type="readahead")


def write_bytes(path: epath.Path, content: bytes) -> None:
  """Writes a file whole or not at all; it is there for good when this returns."""
  if not is_local(path):
    with _as_os_errors(path):
      _store().pipe_file(os.fspath(path), content)
    return
  tmp = f"{os.fspath(path)}.tmp"
  with open(tmp, "wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())  # else the new name may outlive a power cut, and the content not
  os.replace(tmp, path)


def write_text(path: epath.Path, text: str) -> None:
  """Writes a file, UTF-8, whole or not at all; see `write_bytes`."""
  write_bytes(path, text.encode())


def append(path: epath.Path, content: bytes) -> None:
  """Adds to a file, made if there is none; it is there for good when this returns."""
  if not is_local(path):
    try:
      before = read_bytes(path)
    except FileNotFoundError:
      before = b""
    write_bytes(path, before + content)
    return
  with open(path, "ab") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def exists(path: epath.Path) -> bool:
  """Whether there is a file or folder."""
  if is_local(path):
    return os.path.exists(path)
  with _as_os_errors(path):
    return _store().exists(os.fspath(path))


def is_file(path: epath.Path) -> bool:
  """Whether there is a file."""
  if is_local(path):
    return os.path.isfile(path)
  with _as_os_errors(path):
    return _store().isfile(os.fspath(path))


# --- a folder ----------------------------------------------------------------------------------------------------


def make(folder: epath.Path) -> None:
  """Makes a folder and its parents, if missing; a bucket has no folders, only objects with long names."""
  if is_local(folder):
    os.makedirs(folder, exist_ok=True)


def is_dir(folder: epath.Path) -> bool:
  """Whether there is a folder; in a bucket, whether anything lies in it."""
  if is_local(folder):
    return os.path.isdir(folder)
  return bool(names(folder))


def names(folder: epath.Path) -> list[str]:
  """What lies in a folder, sorted; nothing if there is none."""
  try:
    if is_local(folder):
      return sorted(os.listdir(folder))
    with _as_os_errors(folder):
      whole = _store().ls(os.fspath(folder), detail=False)
  except (FileNotFoundError, NotADirectoryError):
    return []
  own = os.fspath(folder).removeprefix(_BUCKETS).rstrip("/")  # listed as well if it is an object, too
  return sorted(name.rstrip("/").rpartition("/")[2] for name in whole if name.rstrip("/") != own)


def below(folder: epath.Path) -> list[str]:
  """The files in the folders below a folder, as paths from there, sorted; without those in the folder itself."""
  if is_local(folder):
    here = pathlib.Path(folder)
    return sorted(p.relative_to(here).as_posix() for p in here.glob("*/**/*") if p.is_file())
  return [file for file in _objects(folder) if "/" in file]


def move(folder: epath.Path, to: epath.Path) -> None:
  """Renames a folder, replacing one of the new name; see the table for what a kill leaves."""
  if is_local(folder):
    shutil.rmtree(to, ignore_errors=True)
    make(to.parent)
    os.rename(folder, to)
    return
  files = _objects(folder)
  with _as_os_errors(folder):
    store, full = _store(), lambda where, file: f"{os.fspath(where)}/{file}"
    for file in _objects(to):
      store.rm_file(full(to, file))
    store.copy([full(folder, file) for file in files], [full(to, file) for file in files])
    for file in sorted(files, key=lambda file: "/" in file):
      store.rm_file(full(folder, file))


def remove(folder: epath.Path) -> None:
  """Removes a folder and all that is in it, if it exists; if the process is killed meanwhile, some of it stays."""
  if is_local(folder):
    shutil.rmtree(folder, ignore_errors=True)
    return
  with _as_os_errors(folder):
    for file in _objects(folder):
      _store().rm_file(f"{os.fspath(folder)}/{file}")


def _objects(folder: epath.Path) -> list[str]:
  """The objects in and below a folder of a bucket, as paths from there, sorted."""
  own = os.fspath(folder).removeprefix(_BUCKETS).rstrip("/") + "/"
  with _as_os_errors(folder):
    found = _store().find(os.fspath(folder))
  return sorted(name.removeprefix(own) for name in found if name.startswith(own) and not name.endswith("/"))


# --- a lock ------------------------------------------------------------------------------------------------------


class Held(ValueError):
  """Another process has the lock; the message names it."""


def lock(path: epath.Path, lost: Callable[[str], None]) -> Lock:
  """Locks a file, which then names its holder, until the lock is closed or this process ends.

  In a bucket the lock is a lease.  If there is one already, this waits for at most `LEASE_S` to see it renewed: a
  process that was killed does not renew its lease, and this one takes it over.

  Args:
    path: the file, which is used for nothing else.
    lost: called with a line, in a thread, if another process has taken the lease over, as happens if this one slept or
      had no network for `LEASE_S`: this process must not write any more.

  Raises:
    Held: another process holds it.
  """
  now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
  who = f"process {os.getpid()} on {platform.node()} since {now}"
  if not is_local(path):
    with _as_os_errors(path):
      return _Lease(path, f"{who}, lease {uuid.uuid4().hex[:8]}", lost)
  file = open(path, "a+")
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as e:
    if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
      file.seek(0)
      holder = file.read().strip() or "another process"
      file.close()
      raise Held(holder) from None
    print(f"{path.parent} can't be locked ({e}): make sure that only one process uses it", flush=True)
  file.seek(0)
  file.truncate()
  file.write(f"{who}\n")
  file.flush()
  return file


class _Lease:
  """An object that its holder writes again and again, each time on condition that nobody else has written it."""

  def __init__(self, path: epath.Path, who: str, lost: Callable[[str], None]):
    from google.api_core import exceptions
    from google.cloud import storage
    bucket, _, name = os.fspath(path).removeprefix(_BUCKETS).partition("/")
    self._blob = storage.Client().bucket(bucket).blob(name)
    self._path, self._who, self._lost, self._errors = path, f"{who}\n", lost, exceptions
    self._generation = 0  # the generation that our next write replaces; 0 for none
    self._take()
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
    self._thread.start()

  def close(self) -> None:
    """Deletes the lease, if it is still ours."""
    if self._done.is_set():
      return
    self._done.set()
    self._thread.join(_PATIENCE_S)
    with contextlib.suppress(Exception):  # if this fails, the lease expires
      self._blob.delete(if_generation_match=self._generation)

  def _take(self) -> None:
    if self._write():
      return
    holder, then = self._read()
    print(f"{self._path.parent} is locked by {holder}: waiting up to {LEASE_S:g} s to see whether that still runs",
          flush=True)
    until = time.monotonic() + LEASE_S
    while then and time.monotonic() < until:
      time.sleep(min(1.0, LEASE_S / 10))
      holder, now = self._read()
      if now and now != then:
        raise Held(holder)
      then = now
    self._generation = then
    if not self._write():
      raise Held(self._read()[0])  # another process was faster

  def _write(self) -> bool:
    """Writes the lease; whether it is ours now, because nobody else has written it meanwhile."""
    try:
      self._blob.upload_from_string(self._who, if_generation_match=self._generation)
    except self._errors.PreconditionFailed:
      # It is ours even so if an earlier try of this upload succeeded, and only its reply was lost.
      holder, generation = self._read()
      if holder != self._who.strip():
        return False
      self._generation = generation
      return True
    self._generation = self._blob.generation
    return True

  def _read(self) -> tuple[str, int]:
    """The holder, and the lease's generation: 0 for nobody."""
    try:
      self._blob.reload()
      generation = self._blob.generation
      return self._blob.download_as_bytes(if_generation_match=generation).decode().strip(), generation
    except self._errors.PreconditionFailed:
      return self._read()  # it was written between the two calls
    except self._errors.NotFound:
      return "nobody", 0

  def _renew(self) -> None:
    while not self._done.wait(RENEW_S):
      try:
        if self._write():
          continue
        holder, generation = self._read()
        if not generation:  # deleted by hand
          self._generation = 0
          continue
      except Exception:  # no network, perhaps: another try comes
        continue
      self._lost(f"{self._path.parent} is now used by {holder}, for this process had not renewed its lock for "
                 f"{LEASE_S:g} s")
      return


# --- the bucket's side -------------------------------------------------------------------------------------------


@functools.cache
def _store():
  """Cloud Storage, with fsspec's interface.

  Raises:
    ValueError: says what to install.
  """
  try:
    import fsspec
    import gcsfs  # noqa: F401  which fsspec needs for gs://
    from google.cloud import storage  # noqa: F401  which Orbax needs
  except ImportError as e:
    raise ValueError(f"a workdir in a bucket needs packages that are missing ({e}): pip install 'virl-jax[gcs]'") from e
  # gcsfs warns at each call if this account may not ask for the bucket's type, which does not matter here.
  logging.getLogger("gcsfs").setLevel(logging.ERROR)
  # Listings are not cached, here or in epath: TensorStore and other processes write to the same folders.
  for name in ("gs", "gcs"):
    fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
  return fsspec.filesystem("gs")


@contextlib.contextmanager
def _as_os_errors(path: os.PathLike):
  """A `with` block in which the libraries' errors become what a disk raises: an `OSError`."""
  try:
    yield
  except (OSError, ValueError):
    raise
  except Exception as e:  # of gcsfs, google-auth, google-cloud-storage, aiohttp
    raise OSError(f"{os.fspath(path)}: {type(e).__name__}: {str(e).partition(chr(10))[0][:200]}") from e
