"""Raw files a record at a time: the same as json gives for the whole, in pieces of any size; and what is refused."""

import json
import tracemalloc

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from virl_jax.data.sources import records
from virl_jax.data.sources import stream

VALUES = st.recursive(st.none() | st.booleans() | st.integers(-10**12, 10**12) | st.floats(allow_nan=False)
                      | st.text(max_size=8), lambda inner: st.lists(inner, max_size=4)
                      | st.dictionaries(st.text(max_size=5), inner, max_size=4), max_leaves=12)


@pytest.fixture
def file(tmp_path):
  def write(content, name="a.json"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)
  return write


@settings(max_examples=60, deadline=None)
@given(value=st.lists(VALUES, max_size=6) | st.dictionaries(st.text(max_size=6), VALUES, max_size=6),
       indent=st.sampled_from([None, 1]), chunk=st.integers(1, 40))
def test_the_members_are_json_s(value, indent, chunk, tmp_path_factory):
  path = tmp_path_factory.mktemp("stream") / "a.json"
  path.write_text(json.dumps({"before": [1, {"x": [2]}], "it": value, "after": 3}, indent=indent,
                             ensure_ascii=chunk % 2 == 0), "utf-8")
  whole = path.with_name("b.json")
  whole.write_text(json.dumps(value, indent=indent), "utf-8")
  want = list(value.items() if isinstance(value, dict) else enumerate(value))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(stream, "_CHUNK_CHARS", chunk)
    assert list(stream.items(str(path), "it")) == want == list(stream.items(str(whole)))
    assert stream.member(str(path), "it") == value and stream.member(str(path), "after") == 3
    assert stream.member(str(path), "nothing") is None
    assert stream.is_list(str(whole)) == isinstance(value, list)


def test_memory_is_bounded(file):
  one = json.dumps({"question": "x" * 2000, "answers": [1, 2, 3]})
  path = file('{"other": [' + ",".join([one] * 8000) + '], "data": [' + ",".join([one] * 8000) + "]}")
  tracemalloc.start()
  assert sum(1 for _ in stream.items(path, "data")) == 8000
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 12e6  # of 32 MB


@pytest.mark.parametrize("content, said", [
    (b'{"a": {"q": 1}, "b": {"q": 2', "a.json ends early, at character 29, where the rest of a record is wanted: half"),
    (b'{"a": {"q": 1},', "ends early"), (b"[1, 2", "ends early"), (b"", "ends early"), (b'["ab', "ends early"),
    (b'{"a": {"q": nonsense}, "b": {"q": "' + b"x" * 100 + b'"}}', "must be JSON, with a value at character 13"),
    (b"[1 2]", "with a comma or ] at character 4. Received: '2]'"),
    (b'{"a" 1}', "with a key and a colon"), (b"3", "a list or an object"),
    (b'["\xff\xfe"]', "must be JSON in UTF-8")])
def test_half_a_download_says_where_it_ends(content, said, file):
  with pytest.raises(ValueError) as error:
    list(stream.items(file(content)))
  assert said in str(error.value)


def test_a_file_without_the_key_is_named(file):
  path = file('{"annotations": [1], "licences": [], "info": {}, "x": 1}')
  with pytest.raises(ValueError, match="must be a JSON object with 'data'. Received: one with 'annotations', 'licences'"
                                       ", 'info'$"):
    list(stream.items(path, "data"))
  with pytest.raises(ValueError, match="an object with 'data'"):
    list(stream.items(file("[1]"), "data"))


def test_a_number_is_read_to_its_end(file, monkeypatch):
  monkeypatch.setattr(stream, "_CHUNK_CHARS", 3)
  assert list(stream.items(file("[12345, 6.25, -7]"))) == [(0, 12345), (1, 6.25), (2, -7)]


def test_lines_and_what_is_broken_among_them(file):
  path = file(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": 2\nnonsense\n[3]\n"\xff"\n', "x.jsonl")
  got = list(stream.lines(path))
  assert [where for where, _ in got] == ["x.jsonl:1", "x.jsonl:4", "x.jsonl:5", "x.jsonl:6", "x.jsonl:7"]
  assert [value for _, value in got if not isinstance(value, records.Reject)] == [{"a": 1}, [3]]
  assert all(v.reason == "broken line" for _, v in got if isinstance(v, records.Reject))
  assert "nonsense" in got[2][1].detail


def objects(*values):
  return list(stream.objects(((f"f:{i}", v) for i, v in enumerate(values)), "f", ("image", "question")))


def test_objects_with_the_wanted_fields():
  good = {"image": "a", "question": "b", "more": 1}
  got = objects(3, {"image": "a"}, good, {"question": 1}, good)
  assert [value is good for _, value in got] == [False, False, True, False, True]
  assert got[1][1] == records.Reject("f:1", "fields are missing",
                                     "wanted: image, question. Received: an object with image")


@pytest.mark.parametrize("values, said", [
    ((), "must hold records with image, question. Received: nothing"),
    (({"x": 1, "y": 2}, [1], "s", {"image": "a", "question": "b"}),
     "f:0: wanted: image, question. Received: an object with x, y; f:1: .*; f:2: wanted.*'s'$"),
    ((records.Reject("f:0", "broken line", "no JSON"),), "Received: f:0: no JSON")])
def test_another_schema_is_shown_by_three_examples(values, said):
  with pytest.raises(ValueError, match=said):
    objects(*values)


def test_files_by_the_first_pattern_that_any_has(tmp_path):
  for name in ("b.json", "a.json", "c.txt", "x/d.json", "a_det.json"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
  found = lambda *patterns, **how: stream.files(str(tmp_path), patterns, "x", **how)
  names = lambda *patterns, **how: [path[len(str(tmp_path)) + 1:] for path in found(*patterns, **how)]
  assert names("*.parquet", "*.json", "*.txt") == ["a.json", "a_det.json", "b.json"]
  assert names("*.json", exclude="_det") == ["a.json", "b.json"] and names("**/d.json") == ["x/d.json"]
  with pytest.raises(ValueError, match=r"gqa's questions must be in .*: \*.parquet or q.json. Received: a folder with "
                                       r"a.json, a_det.json, b.json$"):
    stream.files(str(tmp_path), ("*.parquet", "q.json"), "gqa's questions")
  with pytest.raises(ValueError, match="Received: no such folder"):
    stream.files(str(tmp_path / "no"), ("*",), "x")
  assert stream.folder(str(tmp_path), ("no", "x", "b")) == "x" and stream.folder(str(tmp_path), ("no", "y")) == "no"


def test_parquet_rows_and_their_refusals(tmp_path):
  pa = pytest.importorskip("pyarrow")
  import pyarrow.parquet as pq
  path = str(tmp_path / "a.parquet")
  pq.write_table(pa.table({"a": list(range(600)), "b": [{"x": [i]} for i in range(600)]}), path)
  got = list(stream.rows(path, ("a", "b")))
  assert len(got) == 600 and got[599] == ("a.parquet:600", {"a": 599, "b": {"x": [599]}})
  with pytest.raises(ValueError, match="must have the columns a, image. Received: none named image; it has a, b"):
    list(stream.rows(path, ("a", "image")))
  half = tmp_path / "half.parquet"
  half.write_bytes(open(path, "rb").read()[:500])
  with pytest.raises(ValueError, match="half.parquet must be a whole parquet file"):
    list(stream.rows(str(half), ()))
