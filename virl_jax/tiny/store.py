"""The needle set as a tensorflow-datasets builder, stored as array_record.  TensorFlow is not needed."""

from __future__ import annotations

import io
import json
import os
import pathlib
import shutil
import tempfile

import tensorflow_datasets as tfds

from virl_jax.run import progress
from virl_jax.run import signals
from virl_jax.tiny import needle

tfds.disable_progress_bar()  # it also draws into pipes and files


class Needle(tfds.core.GeneratorBasedBuilder):
  """Needle pictures with questions, answers and rationale boxes.

  Args:
    cfg: what is drawn.  A folder has one configuration: `source.load` names it by its hash.
    folder: where the set is.
  """

  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, cfg: needle.Config, folder: str | os.PathLike):
    self._cfg = cfg
    super().__init__(data_dir=os.fspath(folder), file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
        features=tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(None, None, 3)),
                                             "task": tfds.features.Text()}),
        disable_shuffling=True)

  def _split_generators(self, dl_manager):
    return {"train": self._examples("train", self._cfg.train_size), "test": self._examples("test", self._cfg.test_size)}

  def _generate_examples(self, split, size):
    return self._examples(split, size)

  def _log_download_bytes(self):
    """Prints nothing: TFDS would say that it downloads, and nothing is downloaded."""

  _log_download_done = _log_download_bytes

  def _examples(self, split: str, size: int):
    for i in progress.over(range(size), size, f"drawing the {split} pictures", "picture"):
      task, _ = needle.draw(self._cfg.seed, split, i, self._cfg)
      fields = {"uid": task.uid, "question": task.question, "answers": task.answers, "boxes": task.boxes,
                "kind": task.kind}
      # An encoded file, not an array: TFDS would import TensorFlow to encode one.
      yield i, {"image": io.BytesIO(task.image), "task": json.dumps(fields)}


def read(folder: pathlib.Path, split: str, cfg: needle.Config):
  """The split's records, {"image": bytes, "task": JSON}; generates the set if the folder lacks it.

  Args:
    folder: for this configuration only.
    split: "train" or "test".
    cfg: what to draw if the folder lacks it.
  """
  kept = pathlib.Path(Needle(cfg, folder).data_dir)
  if not kept.exists():
    # Drawn in another folder, which is then renamed: runs that start together all draw, and the first to finish wins.
    kept.parent.mkdir(parents=True, exist_ok=True)
    with (tempfile.TemporaryDirectory(dir=folder) as elsewhere,
          signals.closing(lambda: shutil.rmtree(elsewhere, ignore_errors=True))):
      drawn = Needle(cfg, elsewhere)
      drawn.download_and_prepare()
      try:
        os.rename(drawn.data_dir, kept)
      except OSError:
        if not kept.exists():
          raise
  # A new builder, because a builder only knows the splits that were there when it was made.
  return Needle(cfg, folder).as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
