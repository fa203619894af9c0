"""The prompts of each step: pure in (seed, step), decoded ahead; a task that does not decode is passed over once."""

import io
import threading

from PIL import Image
import pytest

from virl_jax import types
from virl_jax.data import batches


class Source:
  """Tasks 0, 1, ..; those of `bad` have no picture."""

  def __init__(self, n, bad=()):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    self.tasks = [types.Task(str(i), b"" if i in bad else buffer.getvalue(), "?") for i in range(n)]

  def __len__(self):
    return len(self.tasks)

  def task(self, index):
    return self.tasks[index]


def names(tasks):
  return [t.uid for t in tasks]


@pytest.fixture
def feed():
  made = []

  def make(source, seed=3, wanted=4, threads=1):
    made.append(batches.Feed(source, seed, wanted, 10 ** 6, threads=threads))
    return made[-1]

  yield make
  for one in made:
    one.close()


def test_a_feed_gives_each_step_its_own_prompts(feed):
  source = Source(10)
  want = [names(batches.train(source, 3, step, 4, 10 ** 6).tasks) for step in range(6)]
  one = feed(source)
  assert [names(one.batch(step)) for step in range(6)] == want
  assert sum(want[:2], []) != sum(want[2:4], [])
  resumed = feed(source)  # may begin at any step, and jump
  assert [names(resumed.batch(step)) for step in (4, 5, 1)] == [want[4], want[5], want[1]]


def test_further_tries_are_no_steps(feed):
  """A further try of an early step once walked the prompts of a later one."""
  one, n = feed(Source(64), seed=0), 64 // 4
  later = {tuple(names(one.batch(step))) for step in range(8 * n)}
  assert not any(tuple(names(one.further(step, attempt))) in later for step in range(n) for attempt in (1, 2))


def test_what_is_held_out_is_drawn_from_all_of_it():
  """Files are often sorted by source."""
  source = Source(100, bad=(40,))
  drawn = names(batches.held_out(source, 20, 10 ** 6, seed=1).tasks)
  assert len(set(drawn)) == 20 and "40" not in drawn
  assert any(int(uid) >= 75 for uid in drawn) and any(int(uid) < 25 for uid in drawn)
  assert drawn == names(batches.held_out(source, 20, 10 ** 6, seed=1).tasks)
  assert drawn != names(batches.held_out(source, 20, 10 ** 6, seed=2).tasks)
  every = batches.held_out(source, 100, 10 ** 6, seed=3)
  assert names(every.tasks) == [str(i) for i in range(100) if i != 40] and len(every.skipped) == 1


def test_pictures_come_decoded_and_are_what_the_source_has(feed):
  assert all(t.image.size == (4, 4) for t in feed(Source(5)).batch(0))


def test_further_tries_are_of_another_order(feed):
  one = feed(Source(50))
  tries = [names(one.batch(0)), names(one.further(0, 1)), names(one.further(0, 2))]
  assert len({tuple(t) for t in tries}) == 3 and names(one.further(0, 1)) == tries[1]


def test_what_does_not_decode_is_named_and_counted(feed, capsys):
  one = feed(Source(4, bad=(2,)))
  times = [len(batches.train(Source(4, bad=(2,)), 3, step, 4, 10 ** 6).skipped) for step in (0, 1)]
  assert sorted(set(names(one.batch(0)))) == ["0", "1", "3"] and one.skipped == times[0] > 0
  assert capsys.readouterr().out.count("skipped 2: image must be a decodable file") == times[0]
  one.batch(1)
  assert one.skipped == sum(times), "an epoch later it is passed over again"
  with pytest.raises(ValueError, match="must have tasks that can be used. Received: 6 that can't, first .: image"):
    feed(Source(2, bad=(0, 1))).batch(0)


class Blocking(Source):
  """The picture of one task is read when the test says so; when others are read is noted."""

  def __init__(self, n, slow, bad=()):
    super().__init__(n, bad)
    self.slow, self.go, self.read = slow, threading.Event(), []
    self.some = threading.Condition()

  def look(self, image, max_pixels):
    uid = image.partition(b"#")[2].decode()
    if uid == self.slow:
      assert self.go.wait(20)
    with self.some:
      self.read.append(uid)
      self.some.notify_all()
    return DECODE(image.partition(b"#")[0], max_pixels)

  def task(self, index):
    task = self.tasks[index]
    return types.Task(task.uid, task.image + f"#{index}".encode(), "?")

  def until(self, names):
    with self.some:
      assert self.some.wait_for(lambda: set(names) <= set(self.read), 20), (names, self.read)


DECODE = batches.images.decode


def test_a_slow_picture_keeps_no_other_waiting_and_is_named(feed, monkeypatch, capsys):
  """A broken one beside it does not either; the step has the same tasks as ever."""
  want = [names(batches.train(Source(12, bad=(5,)), 3, step, 4, 10 ** 6).tasks) for step in range(2)]
  plain = [[str(i) for i in batches.order.batch_indices(3, step, 12, 4)] for step in range(2)]
  broken = next(step for step in (0, 1, 2) if "5" in [str(i) for i in batches.order.batch_indices(3, step, 12, 4)])
  slow = plain[0][1]
  source = Blocking(12, slow, bad=(5,))
  monkeypatch.setattr(batches.images, "decode", source.look)
  monkeypatch.setattr(batches, "_SLOW_S", 0.05)
  one, got = feed(source, threads=2), []
  asking = threading.Thread(target=lambda: got.append(names(one.batch(0))))
  asking.start()
  source.until({*plain[0], *plain[1]} - {slow})  # all of this step and the next, by the one thread that is not blocked
  assert not got and slow not in source.read
  while "waiting" not in (said := capsys.readouterr().out):
    assert asking.is_alive() and not got
  assert f"waiting for a picture, for 0.05 s so far: that of {slow}" in said
  source.go.set()
  asking.join(20)
  assert got == want[:1] and one.slow == 1 and names(one.batch(1)) == want[1] and one.slow == 1
  if broken == 2:
    one.batch(2)
  assert one.skipped == 1 and "skipped 5: image must be a decodable file" in said + capsys.readouterr().out


def test_what_a_step_needs_does_not_queue_behind_the_next(feed, monkeypatch):
  """Such as a stand-in, or a further try, while the next step's pictures are slow."""
  order = [str(i) for step in range(2) for i in batches.order.batch_indices(3, step, 12, 4)]
  source = Blocking(12, order[4], bad=(int(order[1]),))
  monkeypatch.setattr(batches.images, "decode", source.look)
  one = feed(source)
  assert len(one.batch(0)) == 4 and one.skipped == 1 and order[4] not in source.read
  source.slow = None
  assert len(one.further(0, 1)) == 4
  source.go.set()
  assert names(one.batch(1)) == order[4:8]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_nothing(feed, threads):
  source = Source(9, bad=(1, 4))
  one, other = feed(source, threads=threads), feed(source)
  assert [names(one.batch(step)) for step in range(5)] == [names(other.batch(step)) for step in range(5)]
  assert one.skipped == other.skipped > 0
  drawn = [batches.held_out(source, 6, 10 ** 6, 2, threads=n) for n in (1, threads)]
  assert names(drawn[0].tasks) == names(drawn[1].tasks) and drawn[0].skipped == drawn[1].skipped


def test_an_error_that_is_no_picture_s_ends_the_feed(feed):
  """Also a timeout of the disk, which is not mistaken for a slow picture."""
  source = Source(4)
  source.task = lambda index: (_ for _ in ()).throw(TimeoutError("disk"))
  with pytest.raises(TimeoutError, match="disk"):
    feed(source).batch(0)


def too_long(task):
  if task.uid in "12":
    raise ValueError("its prompt must leave room")


def test_what_does_not_fit_is_passed_over_like_what_does_not_decode(capsys):
  one = batches.Feed(Source(4), 3, 4, 10 ** 6, too_long)
  assert set(names(one.batch(0))) == {"0", "3"} and one.skipped >= 2
  said = capsys.readouterr().out
  assert "skipped 1: its prompt must leave room" in said and "skipped 2: its prompt must leave room" in said
  before = one.skipped
  assert set(names(one.further(0, 1))) == {"0", "3"} and one.skipped > before, "further tries count theirs"
  assert "skipped 1: " in capsys.readouterr().out
  one.close()
  drawn = batches.held_out(Source(4), 4, 10 ** 6, fits=too_long)
  assert names(drawn.tasks) == ["0", "3"] and [why[:4] for why in drawn.skipped] == ["1: i", "2: i"]
