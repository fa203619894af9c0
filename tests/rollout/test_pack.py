"""A small batch worked out by hand, padding, and splitting groups into minibatches."""

import dataclasses

import numpy as np
import pytest

from virl_jax import types
from virl_jax.model import patches
from virl_jax.rollout import pack

GRID = patches.Grid(patch=2, temporal=1, merge=2, window=2)
PAD = 5
CFG = pack.Config(GRID, PAD, max_rounds=3, pad_tokens=4, pad_images=2, pad_shown=2)


def image(rows, cols, value):
  """rows x cols merged cells; every number in it is `value`."""
  shape = (rows * cols * GRID.merge ** 2, GRID.values)
  return types.ImageInput(np.full(shape, value, np.float32), (rows * 2, cols * 2), types.Box(0, 0, 8, 8))


def turn(ids, logp=None, box=None, **kwargs):
  return types.Turn("tool" if logp is None else "assistant", np.array(ids, np.int32),
                    None if logp is None else np.array(logp, np.float32), region=box, **kwargs)


def rows():
  """Two trajectories of a group, which share the shown image: one zooms and answers, one runs out of tokens."""
  shown, crop = image(1, 2, 1.0), image(2, 1, 2.0)
  task = types.Task("t", b"", "?", ("a",), (types.Box(0, 0, 4, 4),))
  prompt = np.array([10, PAD, PAD, 11], np.int32)
  box = types.Box(1, 2, 3, 4)
  zooms = types.Trajectory(
      task, 0, prompt, [turn([20, 21], [-0.1, -0.2], box), turn([12, PAD, PAD], image_index=1),
                        turn([22, 2], [-0.3, -0.4])], [shown, crop], types.StopReason.ANSWERED, "a", True)
  return [zooms, types.Trajectory(task, 1, prompt, [turn([23], [-0.5])], [shown], types.StopReason.OVERLONG, None,
                                  False)]


def images_of(batch, micro=0):
  """The image buckets of a microbatch."""
  return [types.ImageBatch(*(getattr(b, f.name)[micro] for f in dataclasses.fields(b))) for b in batch.rows.images]


def test_by_hand():
  b = pack.pack(rows(), CFG)
  #                        prompt            zoom     tool          answer  padding
  assert b.tokens_BT.tolist() == [[10, 5, 5, 11, 20, 21, 12, 5, 5, 22, 2, 0], [10, 5, 5, 11, 23] + [0] * 7]
  assert b.valid_BT.astype(int).tolist() == [[1] * 11 + [0], [1] * 5 + [0] * 7]
  assert b.sampled_BT.astype(int).tolist() == [[0] * 4 + [1, 1, 0, 0, 0, 1, 1, 0], [0] * 4 + [1] + [0] * 7]
  np.testing.assert_allclose(b.logp_sampler_BT, [[0] * 4 + [-.1, -.2, 0, 0, 0, -.3, -.4, 0],
                                                 [0] * 4 + [-.5] + [0] * 7], atol=1e-7)
  assert b.action_BT.tolist() == [[-1] * 4 + [0, 0] + [-1] * 6, [-1] * 12]
  # The shown image is 1 x 2 and takes positions 1 and 2, the crop is 2 x 1 and takes 7 and 8.
  assert b.pos_BXT[0].tolist() == [[0, 1, 1, 3, 4, 5, 6, 7, 7, 9, 10, 0],
                                   [0, 1, 1, 3, 4, 5, 6, 7, 8, 9, 10, 0],
                                   [0, 1, 2, 3, 4, 5, 6, 7, 7, 9, 10, 0]]
  assert b.pos_BXT[1].tolist() == [[0, 1, 1, 3, 4] + [0] * 7] * 2 + [[0, 1, 2, 3, 4] + [0] * 7]
  # Two images in each bucket, with one window of four cells each: the crops' bucket starts at cell 8.
  assert b.vision_BT.tolist() == [[-1, 0, 1, -1, -1, -1, -1, 8, 9, -1, -1, -1], [-1, 0, 1] + [-1] * 9]
  shown, crops = images_of(b)
  assert shown.patches_IWQC.shape == crops.patches_IWQC.shape == (2, 1, 16, 12)
  assert shown.mask_IWQ.sum((1, 2)).tolist() == crops.mask_IWQ.sum((1, 2)).tolist() == [8, 0]  # shared, so once
  assert shown.patches_IWQC.max() == 1 and crops.patches_IWQC.max() == 2

  assert b.box_BR4.tolist() == [[[1, 2, 3, 4], [0] * 4, [0] * 4], [[0] * 4] * 3]
  assert b.box_mask_BR.tolist() == [[True, False, False], [False] * 3]
  assert b.gt_BJ4.tolist() == [[[0, 0, 4, 4]]] * 2 and b.gt_mask_BJ.all()
  assert b.answer_B.tolist() == b.format_B.tolist() == [1, 0]
  assert b.row_mask_B.tolist() == [True, True]


def test_every_index_leads_to_the_right_image():
  """Three rows, five images of all shapes; the patches behind each placeholder carry its image's number."""
  rng = np.random.default_rng(0)
  a, b, c, d, e = (image(*rng.integers(1, 6, 2).tolist(), n) for n in range(1, 6))
  task = types.Task("t", b"", "?")
  size = lambda im: int(np.prod(im.grid_hw)) // 4
  trajectories = [
      types.Trajectory(task, i, np.array([9] + [PAD] * size(ims[0])),
                       [t for im in ims[1:] for t in (turn([8], [0.0]), turn([PAD] * size(im) + [7]))], list(ims),
                       correct=False)
      for i, ims in enumerate(((a, b, c), (a,), (d, e, b)))]
  batch = pack.pack(trajectories, CFG)
  flat = np.concatenate([x.patches_IWQC[..., 0].reshape(-1, 4) for x in images_of(batch)])
  for r, ims in enumerate(((1, 2, 3), (1,), (4, 5, 2))):
    at = batch.vision_BT[r][batch.vision_BT[r] >= 0]
    want = [n for n in ims for _ in range(size((a, b, c, d, e)[n - 1]))]
    np.testing.assert_array_equal(flat[at], np.repeat(np.array(want)[:, None], 4, 1))
    assert ((batch.tokens_BT[r] == PAD) == (batch.vision_BT[r] >= 0)).all()
  # b is a crop in two rows, and is in the batch once.
  assert (images_of(batch)[1].patches_IWQC[:, 0, 0, 0] == 2).sum() == 1


def test_short_rows_are_joined_by_hand():
  assert pack.joined([3, 5, 2, 4], [1, 3, 0, 2], 6) == [[1], [3, 2], [0]]
  # Each goes where it fits first, in the given order; in a row, the longest come first.
  assert pack.joined([3, 5, 2, 4], range(4), 6) == [[0, 2], [1], [3]]
  assert pack.joined([1] * 10, range(10), 64) == [[*range(8)], [8, 9]]


def joined_rows(lengths, width=32, shards=1, **kwargs):
  """`types.Rows` of sequences of these lengths, without images."""
  task = types.Task("t", b"", "?")
  made = [types.Trajectory(task, i, np.full(n, 9, np.int32), correct=False) for i, n in enumerate(lengths)]
  cfg = dataclasses.replace(CFG, pad_tokens=width // 4, join=True, pad_joined=4, shards=shards, **kwargs)
  return pack.pack(made, cfg)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shards, micro", [(1, 0), (1, 64), (4, 0), (4, 32), (4, 100)])
def test_rows_hold_every_token_once_and_in_order(seed, shards, micro):
  rng = np.random.default_rng(seed)
  lengths = [32, *rng.integers(1, 33, 39).tolist()]
  batch = joined_rows(lengths, shards=shards, microbatch_tokens=micro)
  if shards > 1:
    assert batch.valid_BT.sum(1)[batch.order_B].tolist() == lengths
    lengths = batch.valid_BT.sum(1).tolist()
    loads = np.sum(np.reshape(lengths, (shards, -1)), axis=1)
    assert loads.max() < 1.05 * loads.mean()
  index, found = batch.rows.index_MUT, batch.rows.lengths_MUS
  assert index.shape[2] == 32 and index.shape[1] % shards == 0 and found.shape == (*index.shape[:2], pack.MAX_JOINED)
  if micro:
    assert index.shape[1] // shards * 32 <= micro
  else:
    assert len(index) == 1 and index.shape[1] % 4 == 0
  of_shards = index.reshape(len(index), shards, -1, 32).swapaxes(0, 1)
  for s, part in enumerate(of_shards):
    mine = lengths[s * 40 // shards:(s + 1) * 40 // shards]
    assert sorted(part[part >= 0].tolist()) == [b * 32 + t for b, n in enumerate(mine) for t in range(n)]
  for row, own in zip(index.reshape(-1, 32), found.reshape(-1, pack.MAX_JOINED)):
    at = row[row >= 0]
    assert (row[:len(at)] >= 0).all()  # padding only follows
    new = np.flatnonzero(np.diff(at, prepend=-9) != 1)
    assert (at[new] % 32 == 0).all() and len(set(at[new])) == len(new)  # each from its first token on
    assert np.diff([*new, len(at)]).tolist() == own[own > 0].tolist() == sorted(own[own > 0], reverse=True)


def test_few_numbers_of_microbatches_and_none_smaller_than_a_row():
  rng = np.random.default_rng(0)
  numbers = {len(joined_rows([32] + rng.integers(8, 33, 99).tolist(), microbatch_tokens=32).rows.index_MUT)
             for _ in range(30)}
  assert numbers <= {56, 64, 80, 96, 100} and len(numbers) <= 3
  with pytest.raises(ValueError, match="microbatch_tokens must be at least a row's 32 tokens. Received: 31"):
    joined_rows([32, 3], microbatch_tokens=31)


@pytest.mark.parametrize("shards, groups", [(1, 64), (8, 64), (64, 256)])
def test_little_of_a_long_tail_is_padding(shards, groups):
  """With lengths like those of rollouts, it is under 15% of what is computed, in microbatches of one row."""
  rng = np.random.default_rng(0)
  shares = []
  for _ in range(3):
    of_groups = rng.lognormal(np.log(140), 0.5, groups).repeat(8)  # rollouts of a prompt have similar lengths
    lengths = np.clip(of_groups * rng.lognormal(0, 0.25, 8 * groups), 40, 512).astype(int).tolist()
    rows = joined_rows([512, *lengths[1:]], width=512, shards=shards, microbatch_tokens=512).rows
    used = (rows.lengths_MUS > 0).any((1, 2)).sum()
    shares.append(1 - rows.lengths_MUS.sum() / (used * rows.index_MUT[0].size))
  assert np.mean(shares) < 0.15


def test_a_shard_sees_the_images_of_its_own_rows():
  """An image is there once in a microbatch and shard that share it, and again in another."""
  a, b = image(1, 2, 1.0), image(2, 1, 2.0)
  task, prompt = types.Task("t", b"", "?"), np.array([9, PAD, PAD], np.int32)
  made = [types.Trajectory(task, i, prompt, [], [im], correct=False) for i, im in enumerate((a, a, a, b))]
  cfg = dataclasses.replace(CFG, shards=2, microbatch_tokens=4, row_shown=1, row_crops=1)
  batch = pack.pack(made, cfg)
  assert batch.order_B.tolist() == [0, 2, 1, 3]  # dealt out one by one
  batch = pack.pack([made[i] for i in (0, 2, 1, 3)], cfg)
  assert batch.rows.index_MUT.shape == (2, 2, 4)  # microbatch 0: rows 0 and 2, 1: 1 and 3
  first, second = images_of(batch)[0], images_of(batch, 1)[0]
  assert first.patches_IWQC[:, 0, 0, 0].tolist() == [1, 1] and second.patches_IWQC[:, 0, 0, 0].tolist() == [1, 2]
  assert batch.vision_BT[:, :3].tolist() == [[-1, 0, 1]] * 4
  # With all of a shard's rows in one microbatch, rows 0 and 1 share.
  one = images_of(pack.pack(made, dataclasses.replace(cfg, microbatch_tokens=8)))[0]
  assert one.patches_IWQC[:, 0, 0, 0].tolist() == [1, 0, 1, 2]


def test_rows_are_joined_only_if_asked():
  b = pack.pack(rows(), CFG)
  assert b.rows.index_MUT[0, :, :5].tolist() == [[0, 1, 2, 3, 4], [12, 13, 14, 15, 16]]
  assert b.rows.lengths_MUS.tolist() == [[[11], [5]]]
  b = pack.pack(rows(), dataclasses.replace(CFG, join=True, pad_joined=1))
  assert b.tokens_BT.shape == (2, 16) and b.rows.index_MUT.dtype == np.int32
  assert b.rows.index_MUT.tolist() == [[[*range(11), 16, 17, 18, 19, 20]]]  # eleven and five: just full


@pytest.mark.parametrize("scope, own", [("turn", [0, 0, 0, 0]), ("call", [-1, 0, 0, 0]), ("box", [-1, -1, 0, -1])])
def test_which_tokens_are_an_action_s(scope, own):
  zooms, _ = rows()
  zooms.turns[0] = turn([20, 21, 22, 23], [-1.0] * 4, types.Box(1, 2, 3, 4), spans={"call": (1, 4), "box": (2, 3)})
  cfg = dataclasses.replace(CFG, scope=scope)
  assert pack.pack([zooms], cfg).action_BT[0, 4:9].tolist() == own + [-1]
  zooms.turns[0] = dataclasses.replace(zooms.turns[0], spans={})  # if they are not known, the whole turn's
  assert pack.pack([zooms], cfg).action_BT[0, 4:9].tolist() == [0, 0, 0, 0, -1]


def test_shapes_grow_in_steps():
  one, other = rows()

  def shapes(trajectories, **changes):
    b = pack.pack(trajectories, dataclasses.replace(CFG, **changes))
    return [x.shape for x in (b.tokens_BT, b.gt_BJ4, *(x.mask_IWQ for x in images_of(b)))]

  assert shapes([other]) == [(1, 8), (1, 1, 4), (2, 1, 16), (2, 1, 16)]  # no crop at all, and a bucket for it
  assert shapes([other], pad_tokens=64, pad_images=8) == [(1, 64), (1, 1, 4), (2, 1, 16), (8, 1, 16)]
  three = dataclasses.replace(one.task, boxes=(types.Box(0, 0, 1, 1),) * 3)
  many = [dataclasses.replace(one, task=three, images=[image(1, 2, 0.0), image(2, 1, 0.0)]) for _ in range(3)]
  assert shapes(many) == [(3, 12), (3, 4, 4), (4, 1, 16), (4, 1, 16)]
  assert pack.pack(many, CFG).gt_mask_BJ.sum(1).tolist() == [3, 3, 3]
  bare = dataclasses.replace(other, task=dataclasses.replace(one.task, boxes=()))
  b = pack.pack([bare], CFG)
  assert b.gt_BJ4.shape == (1, 1, 4) and not b.gt_mask_BJ.any()


def test_turns_that_are_only_looked_at_are_not_trained_on():
  one, _ = rows()
  one.turns[0].logp = None  # a demonstration's clumsy zoom
  b = pack.pack([one], CFG)
  assert b.sampled_BT[0].astype(int).tolist() == [0] * 9 + [1, 1, 0]
  assert b.action_BT[0].max() == 0 and b.box_mask_BR[0, 0]


def test_a_second_zoom_is_action_one_and_errors_are_none():
  one, _ = rows()
  refused = [turn([30], [-1.0]), turn([31], error="no")]
  again = [turn([20, 21], [-1.0, -1.0], types.Box(5, 5, 6, 6)), turn([12, PAD, PAD], image_index=2)]
  one.turns[2:2] = refused + again
  one.images.append(one.images[1])
  b = pack.pack([one], CFG)
  assert b.action_BT[0].tolist() == [-1] * 4 + [0, 0] + [-1] * 5 + [1, 1] + [-1] * 7
  assert b.box_BR4[0].tolist() == [[1, 2, 3, 4], [5, 5, 6, 6], [0] * 4]
  assert b.format_B.tolist() == [0]  # an error on the way


@pytest.mark.parametrize("stop, error, good", [
    (types.StopReason.ANSWERED, None, True), (types.StopReason.ANSWERED, "no", False),
    (types.StopReason.MALFORMED, None, False), (types.StopReason.OVERLONG, None, False),
    (types.StopReason.OUT_OF_ROUNDS, None, False), (None, None, False)])
def test_well_formed(stop, error, good):
  one, _ = rows()
  one.stop, one.turns[1].error = stop, error
  assert pack.well_formed(one) == good


def test_overlong_rows_are_masked_if_asked_for():
  assert pack.pack(rows(), dataclasses.replace(CFG, mask_stops=(types.StopReason.OVERLONG,))
                   ).row_mask_B.tolist() == [True, False]
  assert pack.pack(rows(), dataclasses.replace(CFG, mask_stops=(types.StopReason.ANSWERED,))
                   ).row_mask_B.tolist() == [False, True]


def test_what_does_not_fit_is_named():
  with pytest.raises(ValueError, match="trajectories must not be empty"):
    pack.pack([], CFG)
  with pytest.raises(ValueError, match="at most max_rounds=0 visual actions. Received: 1"):
    pack.pack(rows(), dataclasses.replace(CFG, max_rounds=0))
  one, _ = rows()
  one.images.pop()
  with pytest.raises(ValueError, match="2 image placeholders.*Received: 4"):
    pack.pack([one], CFG)


def test_groups_stay_whole_when_dealt():
  trajectories = [types.Trajectory(None, i, None) for i in range(24)]
  indices = lambda parts: [[t.index for t in part] for part in parts]
  assert indices(pack.split(trajectories, 4, 1)) == [list(range(24))]
  assert indices(pack.split(trajectories, 4, 3)) == [list(range(8)), list(range(8, 16)), list(range(16, 24))]


@pytest.mark.parametrize("processes", [2, 4])
def test_minibatches_are_the_same_however_many_processes_share_the_groups(processes):
  whole = pack.split([types.Trajectory(None, i, None) for i in range(3 * 8 * 2)], 2, 3)
  of_process = lambda p: [types.Trajectory(None, i, None) for i in range(3 * 8 * 2) if i // 2 % processes == p]
  parts = [pack.split(of_process(p), 2, 3) for p in range(processes)]
  for m in range(3):
    assert sorted(t.index for part in parts for t in part[m]) == [t.index for t in whole[m]]
    assert len({len(part[m]) for part in parts}) == 1


@pytest.mark.parametrize("n, group, minibatches", [(9, 4, 1), (12, 4, 2), (8, 4, 3)])
def test_groups_must_divide(n, group, minibatches):
  with pytest.raises(ValueError, match=f"{n} trajectories in groups of {group} must divide into {minibatches}"):
    pack.split([types.Trajectory(None, i, None) for i in range(n)], group, minibatches)


def test_an_answer_is_paid_what_it_is_worth():
  task = types.Task("t", b"", "?", ("x",))
  made = [types.Trajectory(task, i, np.zeros(1, np.int32), correct=right, score=score)
          for i, (right, score) in enumerate(((True, 0.75), (False, 0.25), (True, None), (False, None)))]
  np.testing.assert_array_equal(pack.outcomes(made)[0], np.array([0.75, 0.25, 1, 0], np.float32))
