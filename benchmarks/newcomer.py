"""What a newcomer does: README's commands from the clone to the export, timed, in a fresh clone and environment.

    python benchmarks/newcomer.py --python=python3.13           # unchanged: about ten minutes
    python benchmarks/newcomer.py --python=python3.13 --short   # in the short forms that the tests run

The commands are README's first block and its blocks marked `runs`, in their order; see docs/commands.py.  They run in
a terminal, with no cache except pip's.  The clone is of this repository's last commit.  `silent` is the longest time in
which a command printed nothing: how long a person waits without a sign.  OUT/NN.log has what each printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import pty
import re
import shlex
import subprocess
import sys
import tempfile
import termios
import time

import timing  # of this folder

ROOT = pathlib.Path(__file__).parents[1]
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def _read():
  """The module docs/commands.py, which is in no package."""
  spec = importlib.util.spec_from_file_location("commands", ROOT / "docs" / "commands.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def path_of(page: pathlib.Path, is_short: bool) -> list[list[str]]:
  """The words of each command of the first block, which installs, and of the marked blocks."""
  reader = _read()
  found = [(None, text) for _, language, _, text in reader.blocks(page) if language == "bash"][:1]
  found += [(marker, text) for _, _, marker, text in reader.blocks(page)
            if marker is not None and "@tests" not in marker.split()]
  return [reader.shortened(words, marker) if marker and is_short else words
          for marker, text in found for words in reader.commands(text)]


def watched(words: list[str], folder: pathlib.Path, env: dict[str, str], log: pathlib.Path) -> tuple[int, float, float]:
  """Runs a command in a terminal; returns its status, its seconds, and the longest time without output, in seconds."""
  ours, theirs = pty.openpty()
  termios.tcsetwinsize(theirs, (40, 120))
  began = last = time.perf_counter()
  process = subprocess.Popen(words, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
  os.close(theirs)
  silent = 0.0
  with open(log, "wb") as file:
    while True:
      try:
        said = os.read(ours, 1 << 16)
      except OSError:  # the other end is closed
        said = b""
      now = time.perf_counter()
      silent, last = max(silent, now - last), now
      if not said:
        break
      file.write(said)
  os.close(ours)
  return process.wait(), time.perf_counter() - began, silent


def shown(log: pathlib.Path) -> list[str]:
  """The lines as a terminal would show them in the end: of a line that is written over, the last text."""
  text = _CONTROL.sub("", log.read_text(errors="replace").replace("\r\n", "\n"))
  return [line for line in (line.rpartition("\r")[2].strip() for line in text.split("\n")) if line]


def main():
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument("--python", default=sys.executable, help="the interpreter that makes the environment")
  p.add_argument("--short", action="store_true", help="with the options of the markers")
  p.add_argument("--out", type=pathlib.Path, help="the clone and the logs go there; a new folder by default")
  args = p.parse_args()
  out = (args.out or pathlib.Path(tempfile.mkdtemp(prefix="newcomer_"))).resolve()
  out.mkdir(parents=True, exist_ok=True)
  if any(out.iterdir()):
    raise SystemExit(f"error: --out must be a folder that is empty. Received: {out}")
  env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}
  env |= {"VIRL_JAX_CACHE": str(out / "cache"), "TERM": "xterm"}
  folder, rows, failed = out, [], None
  for number, words in enumerate(path_of(ROOT / "README.md", args.short)):
    if words[0] == "cd":
      folder = folder / words[1]
      continue
    if words[0] == "source":
      environment = (folder / words[1]).parents[1]
      env |= {"VIRTUAL_ENV": str(environment), "PATH": f"{environment / 'bin'}{os.pathsep}{env['PATH']}"}
      continue
    if words[:2] == ["git", "clone"]:  # README has a placeholder for the address
      words = ["git", "clone", str(ROOT), words[-1]]
    said = shlex.join(words)
    if words[0].startswith("python") and "venv" in words:
      words = [args.python, *words[1:]]
    log = out / f"{number:02d}.log"
    status, seconds, silent = watched(words, folder, env, log)
    lines = shown(log)
    warnings = sum("warning" in line.lower() for line in lines)
    rows.append({"command": said, "status": status, "seconds": seconds, "silent_s": silent, "warnings": warnings,
                 "last": lines[-1] if lines else ""})
    print(f"{seconds:7.1f} s  {said[:100]}", flush=True)
    if status:
      failed = f"{said} ended with status {status}, see {log}:\n" + "\n".join(lines[-10:])
      break
  header = ["command", "seconds", "silent s", "warnings", "last line"]
  print("\n" + timing.table(header, [[r["command"][:70], f"{r['seconds']:.1f}", f"{r['silent_s']:.1f}", r["warnings"],
                                      r["last"][:60]] for r in rows]))
  whole = sum(r["seconds"] for r in rows)
  print(f"\n{len(rows)} commands, {whole / 60:.1f} minutes{', short forms' if args.short else ''}; see {out}")
  version = subprocess.run([args.python, "--version"], capture_output=True, text=True).stdout.strip()
  print(json.dumps({"command": " ".join(["python", *sys.argv]), "cores": os.cpu_count(), "python": version,
                    "short": args.short, "seconds": whole, "commands": rows}))
  if failed:
    raise SystemExit(f"error: {failed}")


if __name__ == "__main__":
  main()
