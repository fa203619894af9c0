"""Fields that are written in several ways."""

import pytest

from virl_jax.data.sources import fields


@pytest.mark.parametrize("text, question, options", [
    ("<image>\nWhat?", "What?", None), ("What?<image>", "What?", None), ("a <image> b", "a\nb", None),
    ("What?\nA. x\nB. y", "What?", ("x", "y")), ("What?\n(A) x\n(B) y\n(C) z", "What?", ("x", "y", "z")),
    ("What?\nA: x\nB: y\nAnswer with the option's letter.", "What?", ("x", "y")),
    ("What?\nOptions:\nA. x\nB. y", "What?", ("x", "y")), ("Two\nlines?\n\nA. x\n\nB. y", "Two\nlines?", ("x", "y")),
    ("What?\nA. x", "What?\nA. x", None),                  # one is not enough
    ("What?\nB. x\nC. y", "What?\nB. x\nC. y", None),      # options begin at A
    ("A. x\nB. y", "A. x\nB. y", None),                    # and follow a question
    ("What?\nA. x\nB. y\nand so on", "What?\nA. x\nB. y\nand so on", None),
    ("Was A. Lincoln here?", "Was A. Lincoln here?", None), (17, "17", None)])
def test_questions(text, question, options):
  assert fields.question(text) == (question, options)


@pytest.mark.parametrize("value, options, answers", [
    ("B", ("x", "y"), ("B",)), ("B. y", ("x", "y"), ("y",)), ("(B) y", ("x", "y"), ("y",)),
    ("B. z", ("x", "y"), ("B. z",)),                       # the letter and the text disagree: left to the rule
    ("C. z", ("x", "y"), ("C. z",)), ("B. y", None, ("B. y",)), (["x ", "", "x"], None, ("x", "x")), (None, None, ()),
    (3.5, None, ("3.5",))])
def test_answers(value, options, answers):
  assert fields.answer(value, options) == answers


@pytest.mark.parametrize("value, picture", [
    ("a.jpg", "a.jpg"), (["a.jpg"], "a.jpg"), (b"x", b"x"), ({"bytes": b"x", "path": "a"}, b"x"),
    ({"bytes": None, "path": "a"}, "a"), ([{"image": "file:///a/b.jpg"}], "/a/b.jpg")])
def test_pictures(value, picture):
  assert fields.picture(value) == picture


@pytest.mark.parametrize("call, value, reason", [
    (fields.picture, [], "no image"), (fields.picture, ["a", "b"], "several images"),
    (fields.picture, None, "no image"),
    (fields.picture, {"bytes": None, "path": ""}, "no image"), (fields.picture, 3, "no image"),
    (fields.text, True, "fields are missing"), (fields.text, ["a"], "fields are missing"),
    (fields.texts, [["a"]], "fields are missing"), (fields.box_lists, "[1, 2, 3, 4]", "bad boxes")])
def test_what_is_none(call, value, reason):
  with pytest.raises(fields.Unusable) as error:
    call(value)
  assert error.value.args[0] == reason


@pytest.mark.parametrize("value, boxes", [
    (None, ()), ([], ()), ([1, 2, 3, 4], ((1, 2, 3, 4),)), ([[1, 2, 3, 4]], ((1, 2, 3, 4),)),
    ([{"bbox": [1, 2, 3, 4]}, {"bbox_2d": (5, 6, 7, 8)}], ((1, 2, 3, 4), (5, 6, 7, 8))), ([{"x": 1}, None], ((), ()))])
def test_boxes(value, boxes):
  assert fields.box_lists(value) == boxes


def test_options_have_an_order_of_their_own():
  orders = {fields.shuffled("r", ("a", "b", "c"), str(i)) for i in range(200)}
  assert len(orders) > 15 and all(sorted(order) == ["a", "b", "c", "r"] for order in orders)
  places = [fields.shuffled("r", ("a", "b", "c"), str(i)).index("r") for i in range(2000)]
  assert all(abs(places.count(place) - 500) < 100 for place in range(4))


def test_paths_beside_a_file():
  assert fields.beside("/raw", "/raw/a.json", "i/1.jpg") == "i/1.jpg"
  assert fields.beside("/raw", "/raw/sub/a.json", "i/1.jpg") == "sub/i/1.jpg"
  assert fields.beside("/raw", "/raw/sub/a.json", "/abs.jpg") == "/abs.jpg"
  assert fields.beside("/raw", "/raw/a.json", b"x") == b"x"
