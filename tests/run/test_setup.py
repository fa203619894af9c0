"""How a command ends on an error: one line, or all of it for those who want it."""

import pytest

from virl_jax.run import setup


@pytest.mark.parametrize("raised, said", [
    (ValueError("config.steps must be 0 or more. Received: -1"), "config.steps must be 0 or more. Received: -1"),
    (OSError("No space left on device"), "OSError: No space left on device"),
    (RuntimeError("RESOURCE_EXHAUSTED: out of memory\n" + "and where it went\n" * 99),
     "RuntimeError: RESOURCE_EXHAUSTED: out of memory")])
def test_an_error_is_a_line(raised, said, monkeypatch):
  monkeypatch.delenv("VIRL_JAX_DEBUG", raising=False)
  with pytest.raises(SystemExit) as e, setup.told():
    raise raised
  assert str(e.value) == f"error: {said} (VIRL_JAX_DEBUG=1 shows where)"
  monkeypatch.setenv("VIRL_JAX_DEBUG", "1")
  with pytest.raises(type(raised)) as e, setup.told():
    raise raised
  assert e.value is raised


@pytest.mark.parametrize("raised", [SystemExit("error: as it is"), KeyboardInterrupt()])
def test_what_is_no_error_goes_through(raised):
  with pytest.raises(type(raised)) as e, setup.told():
    raise raised
  assert e.value is raised
