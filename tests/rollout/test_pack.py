"""A small batch worked out by hand, padding, and the dealing of groups into minibatches."""

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
  """Two of one group, sharing the shown image: one zooms and answers, one runs out of tokens."""
  shown, crop = image(1, 2, 1.0), image(2, 1, 2.0)
  task = types.Task("t", b"", "?", ("a",), (types.Box(0, 0, 4, 4),))
  prompt = np.array([10, PAD, PAD, 11], np.int32)
  box = types.Box(1, 2, 3, 4)
  zooms = types.Trajectory(
      task, 0, prompt, [turn([20, 21], [-0.1, -0.2], box), turn([12, PAD, PAD], image_index=1),
                        turn([22, 2], [-0.3, -0.4])], [shown, crop], types.StopReason.ANSWERED, "a", True)
  return [zooms, types.Trajectory(task, 1, prompt, [turn([23], [-0.5])], [shown], types.StopReason.OVERLONG, None,
                                  False)]


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
  # Two images a bucket, one window of four cells each: the crop's bucket starts at cell 8.
  assert b.vision_BT.tolist() == [[-1, 0, 1, -1, -1, -1, -1, 8, 9, -1, -1, -1], [-1, 0, 1] + [-1] * 9]
  shown, crops = b.images
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
  flat = np.concatenate([x.patches_IWQC[..., 0].reshape(-1, 4) for x in batch.images])
  for r, ims in enumerate(((1, 2, 3), (1,), (4, 5, 2))):
    at = batch.vision_BT[r][batch.vision_BT[r] >= 0]
    want = [n for n in ims for _ in range(size((a, b, c, d, e)[n - 1]))]
    np.testing.assert_array_equal(flat[at], np.repeat(np.array(want)[:, None], 4, 1))
    assert ((batch.tokens_BT[r] == PAD) == (batch.vision_BT[r] >= 0)).all()
  # b is a crop in two rows, and stands in the batch once.
  assert (batch.images[1].patches_IWQC[:, 0, 0, 0] == 2).sum() == 1


def test_short_rows_are_joined_by_hand():
  index = pack.joined([3, 5, 2, 4], 6, 2)
  # The longest first, each where it fits: 5 alone, 4 with 2, 3 alone; a fourth row makes it even.
  assert index.tolist() == [[6, 7, 8, 9, 10, -1], [18, 19, 20, 21, 12, 13], [0, 1, 2, -1, -1, -1], [-1] * 6]
  # Never more rows than there were.
  assert pack.joined([6, 6, 6], 6, 2).shape == (3, 6)


@pytest.mark.parametrize("seed", range(5))
def test_joined_rows_hold_every_token_once_and_in_order(seed):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, 33, 40).tolist()
  index = pack.joined(lengths, 32, 4)
  assert index.shape[1] == 32 and index.shape[0] % 4 == 0 and sum(lengths) <= index.size < sum(lengths) + 8 * 32
  want = [b * 32 + t for b, n in enumerate(lengths) for t in range(n)]
  assert sorted(index[index >= 0].tolist()) == want
  for row in index:
    at = row[row >= 0]
    assert (row[:len(at)] >= 0).all()  # padding only follows
    new = np.flatnonzero(np.diff(at, prepend=-9) != 1)
    assert (at[new] % 32 == 0).all() and len(set(at[new])) == len(new)  # each from its first token on


def test_rows_are_joined_only_if_asked():
  assert pack.pack(rows(), CFG).joined_UT is None
  b = pack.pack(rows(), dataclasses.replace(CFG, join=True, pad_joined=1))
  assert b.tokens_BT.shape == (2, 16) and b.joined_UT.dtype == np.int32
  assert b.joined_UT.tolist() == [[*range(11), 16, 17, 18, 19, 20]]  # eleven and five: just full


@pytest.mark.parametrize("scope, own", [("turn", [0, 0, 0, 0]), ("call", [-1, 0, 0, 0]), ("box", [-1, -1, 0, -1])])
def test_which_tokens_are_an_action_s(scope, own):
  zooms, _ = rows()
  zooms.turns[0] = turn([20, 21, 22, 23], [-1.0] * 4, types.Box(1, 2, 3, 4), spans={"call": (1, 4), "box": (2, 3)})
  cfg = dataclasses.replace(CFG, scope=scope)
  assert pack.pack([zooms], cfg).action_BT[0, 4:9].tolist() == own + [-1]
  zooms.turns[0] = dataclasses.replace(zooms.turns[0], spans={})  # not known: the turn's
  assert pack.pack([zooms], cfg).action_BT[0, 4:9].tolist() == [0, 0, 0, 0, -1]


def test_shapes_grow_in_steps():
  one, other = rows()

  def shapes(trajectories, **changes):
    b = pack.pack(trajectories, dataclasses.replace(CFG, **changes))
    return [x.shape for x in (b.tokens_BT, b.gt_BJ4, b.images[0].mask_IWQ, b.images[1].mask_IWQ)]

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
  uids = lambda parts: [[t.index for t in part] for part in parts]
  assert uids(pack.split(trajectories, 4, 1, (0, 0))) == [list(range(24))]
  seen = set()
  for seed in range(20):
    dealt = uids(pack.split(trajectories, 4, 3, (7, seed)))
    assert dealt == uids(pack.split(trajectories, 4, 3, (7, seed)))
    assert [len(p) for p in dealt] == [8, 8, 8] and sorted(sum(dealt, [])) == list(range(24))
    for part in dealt:
      for g in (0, 4):
        assert part[g] % 4 == 0 and part[g:g + 4] == list(range(part[g], part[g] + 4))
      assert part[0] < part[4]
    seen.add(str(dealt))
  assert len(seen) > 10


@pytest.mark.parametrize("n, group, minibatches", [(9, 4, 1), (12, 4, 2), (8, 4, 3)])
def test_groups_must_divide(n, group, minibatches):
  with pytest.raises(ValueError, match=f"{n} trajectories in groups of {group} must divide into {minibatches}"):
    pack.split([types.Trajectory(None, i, None) for i in range(n)], group, minibatches, (0,))
