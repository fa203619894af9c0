"""Evaluates a policy on public benchmarks, or scores anyone's predictions, by each benchmark's official rule.

    python -m virl_jax.evaluate --model=runs/v7b --benchmark=vstar,hrbench4k --data=VSTAR,HR/hr_bench_4k.tsv --out=DIR
    python -m virl_jax.evaluate --endpoint=http://HOST:PORT/v1 --model=HF_DIR --benchmark=vstar --data=VSTAR --out=DIR
    python -m virl_jax.evaluate --score=PREDICTIONS --benchmark=pope --data=POPE/output/coco [--out=DIR]
    python -m virl_jax.evaluate --score=result_direct_attributes.jsonl --benchmark=vstar
    python -m virl_jax.evaluate --compare A/vstar B/vstar [--out=DIR]

docs/evaluation.md lists the benchmarks, their layouts, the files of predictions that can be read, and each rule.
--data is each benchmark's own file or folder, in the order of --benchmark.

--model is a run's folder, whose own configuration says how it is asked, or an HF folder, with --config=FILE for that.
DIR/NAME/ then has meta.json, predictions.jsonl (raw text, boxes, seed), results.json, rows.jsonl and report.html.  Stop
it at any time and give the same command again: it goes on, and ends as if it had not been stopped.

--endpoint has a server write the turns (vLLM, SGLang, ...); the loop, crops and rules stay ours.  Only the
configuration, shapes and tokenizer of --model, or else of --config's model.path, are read then.  A question that the
server gives no reply to counts as not evaluated, not as wrong: it is counted and named, and the same command asks it
again.

--score needs no model and looks at no picture; --data may be left out where the predictions hold their questions and
references themselves.  With either, --judge=http://HOST:PORT/v1 --judge_model=NAME has a language model judge answers
that are not literally the reference (V*, VisualProbe, records, ...); verdicts are kept in DIR/verdicts.jsonl.

--compare sets two evaluations of the same tasks side by side: the paired difference, an exact test, what flipped.

It prints the figures, what could not be used and why, and last a line of JSON for each benchmark.
"""

from __future__ import annotations

if __name__ == "__main__":
  from virl_jax.run import signals
  signals.install()

from collections.abc import Sequence
import dataclasses
import json
import os

from absl import app
from absl import flags
from etils import epath
from ml_collections import config_flags

from virl_jax import config as config_lib
from virl_jax.data import endpoint as endpoint_lib
from virl_jax.data import judge_model
from virl_jax.eval import asked
from virl_jax.eval import compare
from virl_jax.eval import outcome
from virl_jax.eval import predictions
from virl_jax.eval import scoring
from virl_jax.eval.benchmarks import rows as rows_lib
from virl_jax.eval.benchmarks import table
from virl_jax.report import benchmark as benchmark_page
from virl_jax.report import gallery
from virl_jax.rollout import remote
from virl_jax.rollout import sample
from virl_jax.rollout import turns
from virl_jax.run import files
from virl_jax.run import hosts
from virl_jax.run import progress
from virl_jax.run import setup
from virl_jax.run import workdir as workdir_lib

_ZOOMS = {"on": (True,), "off": (False,), "both": (True, False)}


def score(path: str, benchmark: str, data: str | None = None, judge: judge_model.Judge | None = None
          ) -> tuple[dict, predictions.Read]:
  """Scores a file of predictions.

  Args:
    path: of the file; see `eval.predictions` for its layouts.
    benchmark: a key of `table.BENCHMARKS`.
    data: the benchmark's own file or folder; None where the predictions hold questions and references.
    judge: whom to ask about answers that the rule does not accept; None for nobody.

  Returns:
    What the benchmark's `score` gives, under the name that was asked for; and what was read.

  Raises:
    ValueError: there is no such benchmark, or a file is of no use.
    judge_model.Unreachable: the judge gives no reply.
  """
  scoring.named(benchmark)
  loaded = None if data is None else scoring.usable(data, benchmark, rows_lib.How(need_images=False, seed=None))
  read = predictions.read(path, benchmark, loaded)
  return scoring.scored(benchmark, read, judge), read


def evaluate(model: str | None, benchmarks: list[str], data: list[str], out: str, cfg: asked.Config = asked.Config(),
             c: config_lib.ConfigDict | None = None, how: rows_lib.How = rows_lib.How(), limit: int = 0,
             zooms: str = "on", options: str = "shuffled", tables: Sequence[str] = (),
             judge: judge_model.Judge | None = None, url: str = "", served: str = "",
             pictures: int = benchmark_page.PICTURES) -> list[dict]:
  """Asks a policy, and scores what it says.

  Args:
    model: a run's folder, an HF folder, or "@tiny".  With an endpoint only its configuration, shapes and tokenizer are
      read, and None is the `model.path` of `c`.
    benchmarks: keys of `table.BENCHMARKS`.
    data: the file or folder of each.
    out: folder for results; a folder for each benchmark in it.
    cfg: how it is asked.
    c: how prompts are worded and images shown, for an HF folder; None for the defaults.  A run has its own.
    how: how benchmarks are read.
    limit: only the first so many tasks of each benchmark; 0 for all.
    zooms: "on", "off", or "both", one after the other.
    options: "shuffled" by `how.seed`, "native", or "both"; "native" may have the right one always in the same place.
    tables: which of `predictions.TABLES` to write as well.
    judge: as for `score`; "summary" goes by the tasks' rules even so.
    url: of an endpoint that is asked in place of the engine; "" for none.
    served: what the endpoint calls the model; "" for what `endpoint.model` of the configuration says.
    pictures: the most tasks whose pictures are on a page.

  Returns:
    What each benchmark's `score` gives, for each way it was asked, with "summary" (`outcome.summary`) of the same
    predictions and, where it was asked without zooms too, "zooming_gap" (`outcome.difference`), with minus without.

  Raises:
    ValueError: there is no such benchmark or model, or a folder holds predictions made in another way.
    judge_model.Unreachable: the judge gives no reply; what the policy said is kept.
    endpoint.Unreachable: the endpoint gave no reply to some tasks, which are named; all else is written.
  """
  if len(data) != len(benchmarks):
    raise ValueError(f"--data must have a path for each of the {len(benchmarks)} benchmarks. Received: {len(data)}")
  seeds = {"shuffled": (how.seed,), "native": (None,), "both": (how.seed, None)}[options]
  there = [[scoring.usable(path, name, dataclasses.replace(how, seed=seed)) for seed in seeds]
           for name, path in zip(benchmarks, data)]
  if url:
    c, p = setup.of_endpoint(model, c)
    server = remote.Endpoint(url, dataclasses.replace(setup.sections(c).endpoint, model=served or c.endpoint.model),
                             hosts.say)
    rollout = asked.by_endpoint(server, cfg, p.step.reward)
    model, step = f"endpoint: {server.cfg.model or 'its only model'}", None
  else:
    c, loaded, p = setup.of_policy(model, c)
    params, step = sample.weights(loaded.params, p.policy.model, p.policy.mesh), loaded.step
    rollout = asked.by_engine(params, cfg, p.step.reward)
  header = workdir_lib.header(c)
  fixed = {"model": model, "step": step, "h0": c.reward.h0, "config": config_lib.flat(
      {section: header["config"][section] for section in ("model", "image", "prompt", "rollout")})}
  told = {key: header[key] for key in ("versions", "device", "devices")} | ({"endpoint": url} if url else {})
  results, lost = [], []
  for name, orders in zip(benchmarks, there):
    hosts.say(f"{name}: {orders[0].describe()}")
    if limit:
      orders = [dataclasses.replace(about, tasks=about.tasks[:limit], rejects=()) for about in orders]
    for about, seed in zip(orders, seeds):
      if about is not orders[0] and asked.fingerprint(about.tasks) == asked.fingerprint(orders[0].tasks):
        continue  # nothing of this benchmark is shuffled
      found, pages = {}, []
      for zoom in _ZOOMS[zooms]:
        policy = p.policy if zoom else turns.without_actions(p.policy)
        folder = files.path(out) / "_".join([name, *(["native_options"] if about is not orders[0] else []),
                                             *([] if zoom else ["without_zoom"])])
        hosts.say(f"{folder.name}: asking {len(about.tasks)} tasks")
        meta = {"fixed": fixed | {"benchmark": name, "zoom": zoom, "options_seed": seed}} | told
        entries = asked.ask(policy, rollout, about.tasks, folder, cfg, meta)
        unsaid = asked.unsaid(entries)
        lost += [f"{folder.name}: {each['uid']}: {each['why']}" for each in unsaid["lost"]]
        if unsaid["lost"] and not any("text" in entry for entry in entries):
          _lost(url, lost)
        read = dataclasses.replace(
            predictions.of_rows(entries, str(folder / "predictions.jsonl"), name, about), rejects=())
        found[zoom] = asked.outcomes(entries, about.tasks)
        of_task = {o.uid: e["uid"] for o, e in zip(found[zoom], (e for e in entries if "text" in e))}
        result = scoring.scored(name, read, judge) | unsaid | {
            "zoom": zoom, "options_seed": seed, "model": model, "step": step, "limit": limit,
            "summary": outcome.summary(found[zoom], c.reward.h0, c.eval.bootstrap,
                                       drawn_with=[of_task[o.uid] for o in found[zoom]])}
        if len(found) > 1:
          result["zooming_gap"] = _gap(found[False], found[True], of_task, c)
        hosts.first(lambda folder=folder, result=result, read=read: _write(folder, result, read, tables))
        _tell(result, read)
        results.append(result)
        pages.append((folder, result, read, entries))
      gap = {key: value for key, value in results[-1].items() if key == "zooming_gap"}  # the page with zooms shows it
      hosts.first(lambda pages=pages, gap=gap: [
          _page(folder, result | gap, read, said, pictures) for folder, result, read, said in pages])
  _lost(url, lost)
  return results


def _lost(url: str, lost: Sequence[str]) -> None:
  """Ends an evaluation that is not whole.

  Raises:
    endpoint.Unreachable: some questions are lost; names them.
  """
  if lost:
    raise endpoint_lib.Unreachable(
        f"--endpoint {url} gave no reply to {len(lost)} questions ({progress.few(lost)}). They count as not evaluated, "
        "none as wrong; what is finished is kept: the same command asks for them again, and for those after them")


def compared(a: str, b: str, out: str | None, pictures: int = benchmark_page.PICTURES) -> list[dict]:
  """The difference of two evaluations, for each benchmark.

  Args:
    a, b: folders that `evaluate` has written, of a benchmark or of several.
    out: folder for comparison.json and comparison.html, in subfolders like those of `a`; None for none.
    pictures: the most tasks whose pictures are on the page.

  Returns:
    What `compare.compare` gives for each.

  Raises:
    ValueError: they are not of the same benchmarks and tasks, by name.
  """
  found = []
  for one, other in compare.pairs(a, b):
    it = table.BENCHMARKS.get(one.result.get("benchmark"))
    told = compare.compare(one, other, own=getattr(it, "figures", None))
    if out:
      folder = files.path(out)
      if one.folder != files.path(a):  # it has folders of several benchmarks
        folder = folder / one.folder.name
      files.make(folder)
      files.write_text(folder / "comparison.json", json.dumps(told, indent=1) + "\n")
      files.write_text(folder / "comparison.html", benchmark_page.comparison(told, one, other, pictures))
    found.append(told)
  return found


def _gap(without: list[outcome.Outcome], with_: list[outcome.Outcome], of_task: dict[str, str], c) -> dict:
  """What zooming is worth on the tasks that were asked both ways; `of_task` names the task of each outcome without."""
  both = {o.uid for o in without} & {o.uid for o in with_}
  old, new = ([o for o in found if o.uid in both] for found in (without, with_))
  return outcome.difference(old, new, c.reward.h0, c.eval.bootstrap, drawn_with=[of_task[o.uid] for o in old])


def _write(folder: epath.Path, result: dict, read: predictions.Read, tables: Sequence[str] = ()) -> None:
  """The result, and what each prediction was worth; and tables for others' programs."""
  files.make(folder)
  for name in tables:
    files.write_text(folder / f"{name}.tsv", predictions.table(read, predictions.TABLES[name]))
  files.write_text(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in result["rows"]))
  lost = {"layout": read.layout, "strange_predictions": list(read.strange),
          "rejected_rows": [dataclasses.asdict(r) for r in read.loaded.rejects],
          "rejected_predictions": [dataclasses.asdict(r) for r in read.rejects]}
  unsaid = {key: result[key] for key in ("skipped", "lost") if key in result}
  files.write_text(folder / "results.json", json.dumps(_bare(result) | unsaid | lost, indent=1) + "\n")


def _page(folder: epath.Path, result: dict, read: predictions.Read, entries: Sequence[dict], pictures: int) -> None:
  """What can be looked at: tasks and raw answers, and a page of them."""
  said = {(uid, i): {"text": p.text, "boxes": p.boxes} for uid, samples in read.predictions.items()
          for i, p in enumerate(samples)}
  said |= {(e["uid"], e["sample"]): e for e in entries if "text" in e}
  shown = benchmark_page.entries(read.loaded.tasks, result["rows"], said, pictures)
  lost = {"rows that cannot be used": [f"row {r.row} {r.name}: {r.cause}" for r in read.loaded.rejects],
          "tasks that cannot be asked": [f"{e['uid']}: {e['why']}" for e in result.get("skipped", ())],
          "tasks that the endpoint gave no reply to": [f"{e['uid']}: {e['why']}" for e in result.get("lost", ())],
          "predictions for no row": list(read.strange),
          "predictions that cannot be used": [f"row {r.row} {r.name}: {r.cause}" for r in read.rejects]}
  gallery.save(str(folder / "shown.jsonl"), shown)
  files.write_text(folder / "report.html", benchmark_page.evaluation(result, shown, lost, pictures))


def _tell_compared(found: dict) -> None:
  """Prints a comparison."""
  def interval(it, sign=""):
    value, low, high = (f"{100 * it[key]:{sign}.2f}" for key in ("value", "low", "high"))
    return f"{value} % [{low}, {high}]"

  lines = [f"{found['benchmark']}: {found['n']} tasks",
           *(f"  {name}: {interval(found[side])}" for name, side in zip(found["names"], "ab")),
           f"  difference: {interval(found['difference'], '+')}, paired",
           f"  {found['gained']} gained, {found['lost']} lost: p = {found['p']:.4g} (McNemar's exact test, two-sided)"]
  lines += [f"  {name}: {100 * it['a']:.2f} % and {100 * it['b']:.2f} %, difference {interval(it, '+')}, paired"
            for name, it in found["figures"].items() if ": " not in name and it["low"] is not None]
  if "p_scores" in found:
    lines.append(f"  {found['better']} better, {found['worse']} worse: p = {found['p_scores']:.4g} (sign test of "
                 "scores)")
  lines += [f"  not the same: {name}: {one!r} and {other!r}" for name, (one, other) in found["differ"].items()]
  hosts.say("\n".join(lines))
  hosts.say(json.dumps({key: value for key, value in found.items() if key not in ("flips", "by_kind", "differ")}))


def _tell(result: dict, read: predictions.Read) -> None:
  """Prints the figures, what could not be used, and a line of JSON."""
  lost = {"rows": read.loaded.describe() if read.loaded.rejects else "",
          "predictions for no row": progress.few(read.strange),
          "predictions that cannot be used": progress.few([f"row {r.row}: {r.cause}" for r in read.rejects])}
  lost |= {f"{what}, {len(result[key])} predictions": progress.few([f"{e['uid']}: {e['why']}" for e in result[key]])
           for key, what in (("skipped", "cannot be asked"), ("lost", "the endpoint gave no reply"))
           if result.get(key)}
  if gap := result.get("zooming_gap"):
    value, low, high = (gap["acc_ans"][key] for key in ("value", "low", "high"))
    lost[f"acc_ans with zooms less without, {gap['n']} tasks"] = (
        "" if value is None else f"{value:+.3f} [{low:+.3f}, {high:+.3f}]")
  hosts.say("\n".join([rows_lib.table(result), *(f"  {what}: {found}" for what, found in lost.items() if found)]))
  hosts.say(json.dumps(_bare(result)))


def _bare(result: dict) -> dict:
  return {key: value for key, value in result.items() if key not in ("rows", "skipped", "lost")}


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the command's flags; not on import, because other commands have flags of the same names."""
  text = lambda name, words: flags.DEFINE_string(name, None, words, flag_values=values)
  number = lambda name, default, least, words: flags.DEFINE_integer(name, default, words, least, flag_values=values)
  several = lambda name, words: flags.DEFINE_list(name, [], words, flag_values=values)
  text("score", "File of predictions to score, in place of asking a model.")
  text("model", "A run's folder, or an HF folder.")
  text("endpoint", "Address of an OpenAI-compatible endpoint, http://HOST:PORT/v1, that is asked in place of the "
       "engine.")
  text("served_model", "What the endpoint calls the model.")
  several("benchmark", f"Which benchmarks: {', '.join(table.BENCHMARKS)}.")
  several("data", "Each benchmark's own file or folder.")
  text("images", "Folder of the pictures, where they do not lie beside --data.")
  text("out", "Folder for results.")
  text("compare", "Two folders of results to compare: --compare A B.")
  flags.DEFINE_enum("options", "shuffled", ["shuffled", "native", "both"], "Whether options are shuffled where a "
                    "benchmark has the right one in a place of its own.", flag_values=values)
  number("seed", 0, 0, "Shuffles options, and draws samples.")
  flags.DEFINE_float("temperature", 0.0, "Of the sampling; 0 is greedy.", 0.0, flag_values=values)
  number("samples", 1, 1, "Of each task.")
  flags.DEFINE_enum("zoom", "on", list(_ZOOMS), "Whether the policy may zoom; both: one after the other, and the "
                    "difference.", flag_values=values)
  number("slots", 64, 1, "Tasks that are asked at a time.")
  flags.DEFINE_multi_enum("table", [], list(predictions.TABLES), "Tables of the predictions for others' programs.",
                          flag_values=values)
  number("pictures", benchmark_page.PICTURES, 0, "Most tasks whose pictures a page has.")
  number("limit", 0, 0, "Of each benchmark only so many tasks; 0 for all.")
  text("judge", "Address of an OpenAI-compatible endpoint, http://HOST:PORT/v1, that judges free answers.")
  text("judge_model", "What the endpoint calls the model.")
  config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
  hosts.define_flags(values)


def main(argv):
  args = flags.FLAGS
  setup.quiet()
  if args.compare:
    if len(argv) != 2 or args.model or args.score or args.benchmark:
      raise app.UsageError("--compare needs two folders, --compare A B, and no benchmark, model or predictions")
    with setup.told():
      for found in compared(args.compare, argv[1], args.out, args.pictures):
        _tell_compared(found)
    return
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  asks = args.model is not None or args.endpoint is not None
  if (args.score is None) != asks or not args.benchmark:
    raise app.UsageError("--benchmark=NAME and either --score=PREDICTIONS, --model=DIR or --endpoint=URL are needed")
  if args.served_model and not args.endpoint:
    raise app.UsageError("--served_model is what --endpoint calls the model")
  if (args.judge is None) != (args.judge_model is None):
    raise app.UsageError("--judge and --judge_model go together")
  if asks:
    if not args.out or not args.data:
      raise app.UsageError("--model and --endpoint need --data and --out")
    setup.begin()
    with setup.told():
      hosts.join(args.coordinator, args.num_processes, args.process_id, args.join_timeout_s)
      store = os.path.join(args.out, "images") if files.is_local(args.out) else None
      how = rows_lib.How(args.images, seed=args.seed, store=store)
      cfg = asked.Config(args.seed, args.temperature, args.samples, args.slots)
      evaluate(args.model, args.benchmark, args.data, args.out, cfg, args.config, how, args.limit, args.zoom,
               args.options, args.table, _judge(args), args.endpoint or "", args.served_model or "", args.pictures)
    return
  with setup.told():
    if len(args.benchmark) > 1 or len(args.data) > 1:
      raise ValueError("--score must be of one benchmark. Received: "
                       f"{', '.join(args.benchmark)} and {len(args.data)} paths as --data")
    judge = _judge(args)
    result, read = score(args.score, args.benchmark[0], args.data[0] if args.data else None, judge)
    if args.out:
      folder = files.path(args.out) / result["benchmark"]
      _write(folder, result, read, args.table)
      _page(folder, result, read, (), args.pictures)
    _tell(result, read)


def _judge(args) -> judge_model.Judge | None:
  """The judge that the flags name; its verdicts are kept where results go, if that is a disk."""
  if not args.judge:
    return None
  for name in args.benchmark:
    scoring.judgeable(name)
  cfg = judge_model.Config(args.judge_model, args.judge)
  if not args.out or not files.is_local(args.out):
    return judge_model.Judge(cfg)
  os.makedirs(args.out, exist_ok=True)
  return judge_model.with_file(cfg, os.path.join(args.out, "verdicts.jsonl"))


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=setup.parse)
