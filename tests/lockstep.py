"""Threads in place of processes: each has a number, and they share and wait as `run/hosts.py` makes processes do."""

from concurrent import futures
import threading

from virl_jax.run import hosts


class Lockstep:
  """`processes` threads; replaces what `hosts` does between processes until `monkeypatch` is undone."""

  def __init__(self, monkeypatch, processes: int):
    self.processes, self._said, self._me = processes, [None] * processes, threading.local()
    self._barrier = threading.Barrier(processes, timeout=60)
    for name in ("mine", "leads", "several", "everyone", "first", "meet"):
      monkeypatch.setattr(hosts, name, getattr(self, name))

  def run(self, do) -> list:
    """Results of `do(number)`, each called in a thread of its own."""
    with futures.ThreadPoolExecutor(self.processes) as pool:
      return list(pool.map(lambda number: self._as_process(do, number), range(self.processes)))

  def _as_process(self, do, number):
    self._me.number = number
    try:
      return do(number)
    except BaseException:
      self._barrier.abort()  # or the others would wait
      raise

  def mine(self, number):
    return number % self.processes == self._me.number

  def leads(self):
    return self._me.number == 0

  def several(self):
    return self.processes > 1

  def everyone(self, value):
    self._said[self._me.number] = value
    self._barrier.wait()
    found = list(self._said)
    self._barrier.wait()
    return found

  def first(self, do):
    return self.everyone(do() if self.leads() else None)[0]

  def meet(self):
    self.everyone(None)
