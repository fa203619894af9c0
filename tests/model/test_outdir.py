"""What an HF folder may replace: nothing that anybody else has put there."""

import pathlib

import pytest

from virl_jax.model import outdir
from virl_jax.model import weights


@pytest.fixture
def earlier(small, tmp_path):
  weights.save_hf(tmp_path / "earlier", small.cfg, small.params, "float32")
  return tmp_path / "earlier"


def content(folder):
  return {p.relative_to(folder): p.is_file() and p.read_bytes() for p in folder.rglob("*")}


def test_absent_empty_and_earlier_ones_are_replaced(small, tmp_path, earlier):
  (tmp_path / "empty").mkdir()
  (earlier / "notes.txt").write_text("goes with it")
  for out in (tmp_path / "absent", tmp_path / "below" / "absent", tmp_path / "empty", earlier):
    outdir.check(out)
    weights.save_hf(out, small.cfg, small.params, "float32")
    assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors", "virl_jax.json"}
  assert {p.name for p in tmp_path.iterdir()} == {"absent", "below", "empty", "earlier"}


@pytest.fixture
def places(tmp_path, earlier, monkeypatch):
  """Folders that must not be replaced, by the reason."""
  (tmp_path / "thesis").mkdir()
  (tmp_path / "thesis" / "chapter_1.tex").write_text("years of work")
  (tmp_path / "link").symlink_to(tmp_path / "thesis")
  (tmp_path / "link_to_earlier").symlink_to(earlier)
  (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
  (tmp_path / "file").write_text("")
  (tmp_path / "home" / "me").mkdir(parents=True)
  (tmp_path / "here" / "deep").mkdir(parents=True)
  monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path / "home" / "me")
  monkeypatch.chdir(tmp_path / "here" / "deep")
  return tmp_path


@pytest.mark.parametrize("out, why", [
    ("{}/thesis", "it holds chapter_1.tex, and no virl_jax.json"), ("{}/link", "it is a symbolic link"),
    ("{}/link_to_earlier", "it is a symbolic link"), ("{}/dangling", "it is a symbolic link"),
    ("{}/file", "it is a file"), (".", "this process is in it"), ("..", "this process is in it"),
    ("{}/here", "this process is in it"), ("/", "this process is in it"), ("{}/home", "the home folder is in it"),
    ("{}/home/me", "the home folder is in it"), ("{}/file/hf", "nothing can be made in")])
def test_nothing_else_is(places, small, out, why):
  before = content(places)
  for refused in (lambda path: outdir.check(path), lambda path: weights.save_hf(path, small.cfg, small.params)):
    with pytest.raises(ValueError, match=r"nothing else is replaced. Received: .*\(" + why.replace(".", r"\.")):
      refused(out.format(places))
  assert content(places) == before


def test_what_was_put_into_an_earlier_one_since_stays(small, earlier):
  (earlier / "runs").mkdir()
  with pytest.raises(ValueError, match="it holds a folder, runs, which was not written with it"):
    weights.save_hf(earlier, small.cfg, small.params)


def test_what_it_is_made_from_stays(tmp_path, earlier):
  for keep in (earlier, earlier / "run"):
    with pytest.raises(ValueError, match=f"{keep} is in it"):
      outdir.check(earlier, (keep,))
  outdir.check(earlier, (tmp_path, tmp_path / "other"))


def test_its_neighbours_stay(small, tmp_path):
  for name in ("hf.tmp", "hf.old"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious").write_text("")
  for _ in range(2):
    weights.save_hf(tmp_path / "hf", small.cfg, small.params)
  assert {str(p) for p in content(tmp_path) if "precious" in str(p)} == {"hf.tmp/precious", "hf.old/precious"}
