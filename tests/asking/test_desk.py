"""One question is answered at a time; those who wait know their place; leaving, or a question that fails, disturbs
nobody."""

import queue

import pytest

from virl_jax.asking import desk as desk_lib


class Hand:
  """Answers a task with what the test puts into its queue."""

  def __init__(self):
    self.orders, self.begun, self.ended = queue.Queue(), queue.Queue(), []

  def __call__(self, task, tell):
    self.begun.put(task)
    while (order := self.orders.get(timeout=10)) != "end":
      if isinstance(order, Exception):
        raise order
      try:
        tell(order)
      except desk_lib.Gone:
        self.ended.append(task)
        raise


def told(events):
  return [e for e in events if e is not None]


def test_one_after_the_other():
  hand, place = Hand(), desk_lib.Place
  desk = desk_lib.Desk(hand)
  with desk.ask("a") as a:
    assert next(a) == place(0) and hand.begun.get(timeout=10) == "a"
    with desk.ask("b") as b, desk.ask("c") as c:
      assert (next(b), next(c)) == (place(1), place(2))
      hand.orders.put("x")
      assert next(a) == "x" and hand.begun.empty()
      hand.orders.put("end")
      assert told(a) == []
      assert (next(b), next(c)) == (place(0), place(1)) and hand.begun.get(timeout=10) == "b"
      hand.orders.put("end")
      assert told(b) == [] and next(c) == place(0)
      hand.orders.put("end")
      assert told(c) == []


def test_who_leaves_gives_his_place_up():
  hand, place = Hand(), desk_lib.Place
  desk = desk_lib.Desk(hand)
  with desk.ask("c") as c:
    with desk.ask("a") as a:
      assert hand.begun.get(timeout=10) == "c" and [next(c), next(a)] == [place(0), place(1)]
      with desk.ask("b") as b:
        assert next(b) == place(2)
      with desk.ask("d") as d:
        assert next(d) == place(2), "b has left"
  with desk.ask("e") as e:
    assert next(e) == place(1), "only c is left, which is being answered"
    hand.orders.put("nobody hears this")
    assert hand.begun.get(timeout=10) == "e" and hand.ended == ["c"], "the policy stopped"
    hand.orders.put("end")
    assert told(e) == [place(0)]


@pytest.mark.parametrize("error, said", [(ValueError("too long"), "too long"),
                                         (RuntimeError("secret path"), "the policy failed: RuntimeError")])
def test_what_fails_is_told_and_the_next_is_answered(error, said, capsys):
  hand = Hand()
  desk = desk_lib.Desk(hand)
  for order in (error, "end"):
    with desk.ask("a") as a:
      hand.orders.put(order)
      *_, last = told(a)
      assert last == (desk_lib.Failed(said) if order is error else desk_lib.Place(0))
  assert ("secret path" in capsys.readouterr().err) == isinstance(error, RuntimeError)


def test_it_is_full_and_then_it_is_not():
  hand = Hand()
  desk = desk_lib.Desk(hand, most=2)
  with desk.ask("a"), desk.ask("b"):
    with pytest.raises(desk_lib.Full, match="2 questions are waiting"), desk.ask("c"):
      pass
  hand.orders.put("x")
  with desk.ask("d") as d:
    hand.orders.put("end")
    assert desk_lib.Place(0) in told(d)


def test_silence_is_told_too():
  hand = Hand()
  with desk_lib.Desk(hand, beat_s=0.01).ask("a") as a:
    next(a)
    assert next(a) is None
    hand.orders.put("end")
    assert told(a) == []
