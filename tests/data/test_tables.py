"""Other people's tables, arrays and lines, and what is wrong with them."""

import base64
import json

import pytest

from virl_jax.data import tables

PICTURE = b"x" * 100


def _tsv(tmp_path, text, name="t.tsv"):
  path = tmp_path / name
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return str(path)


def test_a_table(tmp_path):
  path = _tsv(tmp_path, '\ufeffindex\tquestion\tA\n0\t"two\nlines, ""quoted"", and a\ttab"\tx\n1\tplain\t\n')
  assert list(tables.tsv(path, ("index", "A"))) == [
      {"index": "0", "question": 'two\nlines, "quoted", and a\ttab', "A": "x"},
      {"index": "1", "question": "plain", "A": ""}]


def test_a_picture_is_one_field_however_large(tmp_path):
  big = "A" * 5_000_000
  assert next(tables.tsv(_tsv(tmp_path, f"image\n{big}\n"), ()))["image"] == big


def test_a_missing_column_is_named(tmp_path):
  path = _tsv(tmp_path, "index\tquestion\n0\tx\n")
  with pytest.raises(ValueError, match="must have the columns index, A, B. Received: no A, no B; it has index, q"):
    list(tables.tsv(path, ("index", "A", "B")))
  with pytest.raises(ValueError, match="no index; it has none"):
    list(tables.tsv(_tsv(tmp_path, ""), ("index",)))


@pytest.mark.parametrize("line", ["0\tx\ty", "0"])
def test_a_row_with_other_columns(tmp_path, line):
  row = next(tables.tsv(_tsv(tmp_path, f"index\tquestion\n{line}\n"), ()))
  with pytest.raises(tables.Unusable, match="another number of columns than the header"):
    tables.columns(row)


def test_another_encoding_is_the_row_s_fault(tmp_path):
  path = _tsv(tmp_path, b"index\tquestion\n0\tna\xefve\n1\tna\xc3\xafve\n")
  bad, good = tables.tsv(path, ())
  with pytest.raises(tables.Unusable, match="question is not UTF-8"):
    tables.text(bad, "question")
  assert tables.text(good, "question") == "na\u00efve"
  with pytest.raises(ValueError, match="must be text in UTF-8. Received: UTF-16"):
    list(tables.tsv(_tsv(tmp_path, "index\n0\n".encode("utf-16")), ()))
  with pytest.raises(ValueError, match="must be a file that can be read"):
    list(tables.tsv(str(tmp_path / "none.tsv"), ()))


@pytest.mark.parametrize("text", [
    '[{"a": 1}, {"a": 2}]', '{"data": [{"a": 1}, {"a": 2}], "x": 0}', '{"a": 1}\n{"a": 2}\n', '{"a": 1}\r\n\n{"a": 2}',
    '\ufeff[{"a": 1}, {"a": 2}]'])
def test_arrays_objects_and_lines(tmp_path, text):
  assert tables.json_rows(_tsv(tmp_path, text, "t.json")) == [{"a": 1}, {"a": 2}]


def test_one_line_and_broken_lines(tmp_path):
  assert tables.json_rows(_tsv(tmp_path, '{"a": 1}\n')) == [{"a": 1}]
  first, broken, last = tables.json_rows(_tsv(tmp_path, '{"a": 1}\n{"a": \n{"a": 3}\n'))
  assert (first, last) == ({"a": 1}, {"a": 3})
  with pytest.raises(tables.Unusable, match="not JSON"):
    tables.text(broken, "a")
  for text in ("", "nothing", '"text"', '{\n"rows": []}', "3"):
    with pytest.raises(ValueError, match="must be a JSON array, an object with one under 'data', or JSON lines"):
      tables.json_rows(_tsv(tmp_path, text))


def test_fields():
  row = {"a": "x", "n": 3, "e": " ", "l": ["p", 2], "z": "\0", "s": "\ud800", "d": {}, "m": []}
  assert tables.text(row, "none", "a") == "x" and tables.text(row, "n") == "3"
  assert tables.text(row, "e", empty=True) == " "
  assert tables.texts(row, "l") == ("p", "2")
  for name, why in (("none", "no none"), ("e", "e is empty"), ("z", "null character"), ("s", "not UTF-8"),
                    ("d", "not text"), ("l", "not text")):
    with pytest.raises(tables.Unusable, match=why):
      tables.text(row, name)
  for name in ("a", "m", "d"):
    with pytest.raises(tables.Unusable, match="not a list of texts"):
      tables.texts(row, name)
  with pytest.raises(tables.Unusable, match="not an object"):
    tables.text(["a"], "a")


def test_pictures_inside_and_indices_of_rows_that_have_them():
  known, kept = {}, []
  data = base64.b64encode(PICTURE).decode()
  keep = lambda found: kept.append(found) or "a path"
  assert tables.picture(data, known, "0", keep) == "a path" and kept == [PICTURE]
  assert tables.picture("0", known, "1") == "a path" and set(known) == {"0"}, "an index is no picture to point at"
  assert tables.picture(f"data:image/png;base64,{data}", known) == PICTURE
  for field, why in (("7", "index of no row"), ("1", "index of no row"), ("", "no image"), ("*" * 100, "not base64"),
                     (data[:-3], "not base64")):
    with pytest.raises(tables.Unusable, match=why):
      tables.picture(field, known, "9")


def test_rows_are_json_for_whoever_writes_them_again(tmp_path):
  row = next(tables.tsv(_tsv(tmp_path, "index\tquestion\n0\tx\n"), ()))
  assert json.loads(json.dumps(row)) == row
