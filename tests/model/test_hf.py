"""Values from JSON: which are accepted, which refused, and that each refusal names file and key."""

import pytest

from virl_jax.model import hf


def test_what_is_there_and_what_is_left_out():
  config = {"n": 3, "none": None, "x": 1, "on": True, "list": [2, 0], "inner": {"a": 1}, "id": 7}
  assert (hf.whole(config, "n", ""), hf.whole(config, "none", "", 5), hf.whole(config, "absent", "", 5)) == (3, 5, 5)
  assert hf.real(config, "x", "") == 1.0 and isinstance(hf.real(config, "x", ""), float)
  assert hf.flag(config, "on", "") and not hf.flag(config, "none", "") and hf.flag(config, "absent", "", True)
  assert hf.wholes(config, "list", "") == (2, 0) and hf.wholes(config, "none", "", (1,)) == (1,)
  assert hf.section(config, "inner", "") == {"a": 1} and hf.section(config, "none", "") == {}
  assert hf.ids(config, "id", "", (1,)) == (7,) and hf.ids(config, "none", "", (1, 2)) == (1, 2)
  assert hf.ids({"id": [4, 3, 4]}, "id", "", ()) == (4, 3)


@pytest.mark.parametrize("read, wanted, bad", [
    (hf.whole, "a whole number, 1 or more", (0, -1, "3", 3.0, True, [], {})),
    (hf.real, "a positive number", (0, -1.5, "1", True, float("nan"), float("inf"), [])),
    (hf.flag, "true or false", (0, 1, "true", [])),
    (hf.wholes, "a list of whole numbers, each 0 or more", (3, [1.5], ["1"], [-1], [True], "12", {})),
    (hf.section, "an object", ([], "x", 3, False)),
    (lambda *at: hf.ids(*at, (1,)), "a token id or a list of them", ([], "3", [None], -1, 1.5, True, {}))])
def test_what_is_of_another_kind_is_refused(read, wanted, bad):
  for value in bad:
    with pytest.raises(ValueError, match=f"^file: key must be {wanted}. Received: "):
      read({"key": value}, "key", "file")


def test_what_must_be_there_is_missed():
  for read in (hf.whole, hf.wholes, hf.real):
    for config in ({}, {"key": None}):
      with pytest.raises(ValueError, match="^file: key 'key' is missing$"):
        read(config, "key", "file")


def test_files(tmp_path):
  path = tmp_path / "a.json"
  for text, said in (("{", "must be JSON"), ("[1]", "must hold a JSON object. Received: list"),
                     ("[" * 100_000, "must be JSON")):
    path.write_text(text)
    with pytest.raises(ValueError, match=f"a.json {said}"):
      hf.read(path)
  path.write_bytes(b"\xff")
  with pytest.raises(ValueError, match="a.json must be JSON"):
    hf.read(path)
  path.write_text('{"a": 1}')
  assert hf.read(path) == {"a": 1}
  with pytest.raises(FileNotFoundError):
    hf.read(tmp_path / "absent.json")
