"""The parts of a set: what jobs are refused, how large parts get, and ids that come only once."""

import numpy as np
import pytest

from tests.data.curation.test_build import picture
from virl_jax.data.curation import build
from virl_jax.data.curation import parts
from virl_jax.data.sources import sets


@pytest.mark.parametrize("fields, said", [
    ({"source": "coco"}, "--source must be one of visual_cot, gqa.*'coco'"),
    ({"split": "minival"}, "--split must be one of train, val, test for jsonl.*'minival'"),
    ({"boxes_from": "x"}, "--boxes_from must be left out for jsonl"),
    ({"max_rejects": 2.0}, r"--max_rejects must be a share in \[0, 1\]. Received: 2.0")])
def test_bad_jobs(fields, said):
  with pytest.raises(ValueError, match=said):
    parts.Job(**{"source": "jsonl", "root": "r", "split": "train", "out": "o", **fields})


def test_ids_are_remembered_however_many(monkeypatch):
  monkeypatch.setattr(parts, "_SEEN_PENDING", 64)
  seen, slow, rng = parts._Seen(), set(), np.random.default_rng(0)
  for _ in range(50):
    hashes = [int(h) for h in rng.integers(0, 1500, 37)] + [2 ** 64 - 1 - int(rng.integers(0, 40))]
    want = []
    for number in hashes:
      want.append(number not in slow)
      slow.add(number)
    assert seen.news(hashes) == want


def test_chunks_are_bounded_by_bytes(tmp_path, monkeypatch):
  pa = pytest.importorskip("pyarrow")
  import pyarrow.parquet as pq
  rows = [{"image": {"bytes": picture(i), "path": None}, "question": "q", "answer": "a", "id": i} for i in range(9)]
  pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
  monkeypatch.setattr(parts, "CHUNK_BYTES", 2 * len(picture(0)))
  parquet = parts.Job("hf_parquet", str(tmp_path), "train", str(tmp_path / "out"))
  assert [len(chunk) for _, chunk in parts.chunks(parquet)] == [2, 2, 2, 2, 1]
  assert build.run(parquet).tasks == 9
  assert sets.load(tmp_path / "out", "all", 0.2, 0).task(8).image == picture(8)
