"""Several processes, each with devices of its own: how they join, what belongs to which, and how they agree.

JAX's multi-controller runtime does the work: each process runs the same program, and `run/placement.py` has how arrays
get to its devices and back.  On the host, processes go in lock-step: all of them call `agree`, `everyone` and `first`,
in the same order.  With one process these functions do nothing.

Tasks are dealt out by number: of P processes, process i mod P has task i, so that any run of neighbours is shared out
evenly, and which trajectories make a minibatch does not depend on how many processes there are.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
import contextlib
import os
import pickle
import platform
import sys
import threading
import time
from typing import Any
from typing import TypeVar

from absl import flags
import jax
import numpy as np

from virl_jax.run import progress
from virl_jax.run import signals

AUTOMATIC = "VIRL_JAX_DISTRIBUTED"  # environment: "auto" has JAX ask its cluster, as launchers set it
_HEARTBEAT_S = 30  # if a process is silent for so long, JAX ends the others
_PIECE = 2 ** 20  # most bytes of each process that are gathered at a time
_LISTEN_S = 1.0  # how often a process asks whether another one has failed
FAREWELL_S = 5.0  # how long a process that knows of a failure waits for the others to hear of it
_LEAVING_S = 0.5  # how long process 0 then waits for those that have heard to end
_FAILED, _HEARD, _MET = "virl_jax/failed", "virl_jax/heard", "virl_jax/met"  # keys of JAX's coordination service

# State of this process, as in `signals`.
_beat: tuple[str, float] = ("start", time.monotonic())
_waited_s = 0.0
_met = 0  # calls of `meet`, as many on all processes

T = TypeVar("T")


class Failed(ValueError):
  """The failure of another process, on those that did not fail themselves."""


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags of a command that several processes run together."""
  flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where several processes train together.",
                      flag_values=values)
  flags.DEFINE_integer("num_processes", None, "How many they are.", flag_values=values)
  flags.DEFINE_integer("process_id", None, "The number of this process, from 0.", flag_values=values)
  flags.DEFINE_float("join_timeout_s", 300.0, "Seconds to wait for the others at the start.", flag_values=values)


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None,
         timeout_s: float = 300.0, together: bool = True) -> None:
  """Makes this process one of several, if a launcher or the flags say so; before JAX touches a device.

  Args:
    coordinator, processes, process: HOST:PORT of process 0, how many processes there are, and which this is.  All None:
      JAX asks the cluster if the environment has `AUTOMATIC`=auto (it knows Cloud TPU, Slurm, GKE and others); else
      this process is alone.
    timeout_s: how long processes wait for each other.
    together: whether a signal to one process waits for `agree`, which ends all at the same place.  If not, it ends that
      process wherever it is, and then the others: for work whose pieces are written whole or not at all.

  Raises:
    ValueError: the arguments make no sense, or JAX can't start.  If the others don't come, the process ends with a
      line.
  """
  given = {"--coordinator": coordinator, "--num_processes": processes, "--process_id": process}
  automatic = os.environ.get(AUTOMATIC, "")
  if automatic not in ("", "auto"):
    raise ValueError(f"{AUTOMATIC} must be auto, or not be set. Received: {automatic}")
  if all(value is None for value in given.values()) and not automatic:
    return
  missing = [name for name, value in given.items() if value is None]
  if 0 < len(missing) < 3:
    raise ValueError(f"--coordinator, --num_processes and --process_id must be given together. Missing: "
                     f"{', '.join(missing)}")
  if not missing:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
      raise ValueError(f"--coordinator must be HOST:PORT. Received: {coordinator}")
    if not 0 <= process < processes:
      raise ValueError(f"--process_id must be at least 0 and below --num_processes={processes}. Received: {process}")
    if processes == 1:
      return
  # Signals are ours, see `signals.note`; older versions of JAX have no such option.
  if hasattr(jax.config, "jax_enable_preemption_service"):
    jax.config.update("jax_enable_preemption_service", False)
  # A CPU runs independent programs at the same time, and their sums over processes would begin in an order of each
  # process's own: processes would wait for one another for ever.  Accelerators run one program after the other.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  where = coordinator or "the address that the cluster gives"
  said = (f"the {f'{processes} ' if processes else ''}processes must find each other within {timeout_s:g} s, by the "
          f"coordinator at {where}: look whether all were started, and whether that can be reached from "
          f"{platform.node()}")
  # Sooner than JAX, which would abort the process with pages of addresses.
  patience = threading.Timer(timeout_s, lambda: (print(f"error: {said}", file=sys.stderr, flush=True), os._exit(1)))
  patience.daemon = True
  patience.start()
  try:
    jax.distributed.initialize(coordinator, processes, process, initialization_timeout=round(timeout_s) + 60,
                               heartbeat_timeout_seconds=_HEARTBEAT_S)
  except Exception as e:  # of the client, of gRPC, of whatever the cluster is asked by
    raise ValueError(f"{said} ({str(e).partition(chr(10))[0]})") from e
  finally:
    patience.cancel()
  if jax.process_count() > 1:
    if jax.default_backend() == "cpu":
      # Processes have hung where one had read its programs from the disk and another had compiled them.  It seems that
      # programs from the disk do not keep the order of independent sums.
      jax.config.update("jax_enable_compilation_cache", False)
    (signals.note if together else signals.retake)()
    leaving = threading.Event()
    listening = threading.Thread(target=_listen, args=(leaving,), name="hosts", daemon=True)
    # A thread that is inside JAX's service when Python exits would crash the process.
    atexit.register(lambda: (leaving.set(), listening.join()))
    listening.start()


def _client():
  """JAX's coordination service, a store of keys among other things; None for a process that is alone."""
  from jax._src import distributed  # there is no public way; Orbax uses this one too
  return distributed.global_state.client


def fail(message: str) -> None:
  """Tells all other processes that this one has failed, so that none waits for it; the caller then ends it."""
  if jax.process_count() == 1 or (client := _client()) is None:
    return
  _tell(client, _FAILED, f"{jax.process_index()} {message}")
  _farewell(client)


def _tell(client, key: str, value: str) -> None:
  with contextlib.suppress(Exception):  # the key is set already, or no process is left
    client.key_value_set(key, value)


def _farewell(client) -> None:
  """Notes that this process knows of the failure, and waits until all do: if it ended sooner, their sums would fail.

  Process 0, which runs JAX's service, ends last: JAX aborts a process whose service is gone.
  """
  _tell(client, f"{_HEARD}/{jax.process_index()}", "")
  until = time.monotonic() + FAREWELL_S
  with contextlib.suppress(Exception):  # one is gone, or does not answer
    for other in set(range(jax.process_count())) - {jax.process_index()}:
      client.blocking_key_value_get(f"{_HEARD}/{other}", max(1, round(1000 * (until - time.monotonic()))))
  if leads():
    time.sleep(_LEAVING_S)


def _listen(leaving: threading.Event) -> None:
  """Ends this process when another one fails."""
  client = _client()
  while not leaving.wait(_LISTEN_S):
    try:
      said = client.key_value_try_get(_FAILED)
    except Exception as e:
      if "NOT_FOUND" in str(e):
        continue
      return  # the service is gone: JAX says so, and ends the process
    number, _, message = said.partition(" ")
    if int(number) == jax.process_index():
      return
    signals.wait()  # a process that was stopped by a signal ends as that demands
    print(f"error: process {number} has failed, and so all stop: {message}", flush=True)
    _farewell(client)
    os._exit(1)


# --- who does what -----------------------------------------------------------------------------------------------


def number() -> int:
  """Which process this is, from 0 on."""
  return jax.process_index()


def several() -> bool:
  """Whether there are other processes."""
  return jax.process_count() > 1


def leads() -> bool:
  """Whether this process is the one that writes the workdir."""
  return jax.process_index() == 0


def say(line: object) -> None:
  """Prints a line, once for all processes."""
  if leads():
    progress.say(line)


def mine(number: int) -> bool:
  """Whether the task or group of this number, in a step's order, is this process's."""
  return number % jax.process_count() == jax.process_index()


# --- agreeing ----------------------------------------------------------------------------------------------------


def agree(values: Sequence[int] | np.ndarray) -> np.ndarray:
  """The largest of each value over all processes: int32[...].

  This is also where processes agree to stop if one of them has received a signal.

  Raises:
    signals.Stopped: on all processes alike, at the same call.
  """
  values = np.asarray(values)
  beat()
  if jax.process_count() == 1:
    return values
  all_ = _gather(np.append(values.ravel(), signals.noted()).astype(np.int32))
  if stop := all_[:, -1].max():
    raise signals.Stopped(int(stop))
  return all_[:, :-1].max(0).reshape(values.shape)


def everyone(value: T) -> list[T]:
  """The values of all processes, by process number; anything that can be pickled.  A signal does not end it."""
  if jax.process_count() == 1:
    return [value]
  mine = np.frombuffer(pickle.dumps(value), np.uint8)
  pieces = _gather(np.array(divmod(len(mine), _PIECE), np.int32)).astype(np.int64)
  sizes = pieces @ (_PIECE, 1)
  parts = []
  for start in range(0, int(sizes.max()), _PIECE):
    room = 1 << int(min(sizes.max() - start, _PIECE) - 1).bit_length()  # few sizes: each is compiled
    part = mine[start:start + room]
    parts.append(_gather(np.pad(part, (0, room - len(part)))))
  return [pickle.loads(row[:n].tobytes()) for row, n in zip(np.concatenate(parts, 1), sizes)]


def in_order(numbered: list[tuple[int, T]]) -> list[T]:
  """The numbered values of all processes, in the order of their numbers."""
  return [value for _, value in sorted(sum(everyone(numbered), []), key=lambda pair: pair[0])]


def first(do: Callable[[], T]) -> T:
  """Calls `do` on process 0, and returns its result on all.

  Raises:
    Failed: on the others, if `do` raises on process 0, where its own exception is raised.
  """
  if jax.process_count() == 1:
    return do()
  result, error = None, None
  if leads():
    try:
      result = do()
    except Exception as e:
      error = e
  result, said = everyone((result, None if error is None else str(error)))[0]
  if error is not None:
    raise error
  if said is not None:
    raise Failed(said)
  return result


def meet() -> None:
  """Waits until all processes are here, however long they have worked apart: a sum over processes would time out."""
  global _met, _waited_s
  if jax.process_count() == 1:
    return
  client, began, _met = _client(), time.monotonic(), _met + 1
  client.key_value_set(f"{_MET}/{_met}/{jax.process_index()}", "")
  for other in set(range(jax.process_count())) - {jax.process_index()}:
    while not _is_there(client, f"{_MET}/{_met}/{other}"):
      beat()
  _waited_s += time.monotonic() - began


def _is_there(client, key: str) -> bool:
  """Whether a key is set, or will be soon."""
  try:
    client.blocking_key_value_get(key, round(1000 * _LISTEN_S))
    return True
  except Exception as e:
    if "DEADLINE_EXCEEDED" not in str(e):
      raise
    return False


def same(what: str, value: Any) -> None:
  """Makes sure that all processes have the same value.

  Args:
    what: the value's name, for the error.
    value: a dict, of which the error names the first key that differs, or anything with a meaningful `repr`.

  Raises:
    ValueError: on each process whose value is not process 0's; `Failed` on the rest.
  """
  all_ = everyone(value)
  odd = [i for i, other in enumerate(all_) if other != all_[0]]
  if not odd:
    return
  who = jax.process_index() if jax.process_index() in odd else odd[0]
  mine, theirs = all_[who], all_[0]
  if isinstance(mine, dict):
    key = next(k for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k))
    what, mine, theirs = f"{what} ({key})", mine.get(key), theirs.get(key)
  kind = ValueError if jax.process_index() in odd else Failed
  raise kind(f"all processes must have the same {what}. Received: {mine!r} on process {who}, {theirs!r} on process 0")


def _gather(a: np.ndarray) -> np.ndarray:
  """[processes, ...]: each process's array, all of one shape and dtype."""
  global _waited_s
  from jax.experimental import multihost_utils
  began = time.monotonic()
  found = np.asarray(multihost_utils.process_allgather(a)).reshape(jax.process_count(), *a.shape)
  _waited_s += time.monotonic() - began
  return found


# --- getting on --------------------------------------------------------------------------------------------------


def beat(where: str | None = None) -> None:
  """Notes that this process makes progress, and where it is, if that is given."""
  global _beat
  _beat = _beat[0] if where is None else where, time.monotonic()


def last_beat() -> tuple[str, float]:
  """Where this process was at its last `beat`, and when that was, by `time.monotonic`."""
  return _beat


def waited() -> float:
  """Seconds that this process has waited for others in `agree`, `everyone`, `first` and `meet`."""
  return _waited_s
