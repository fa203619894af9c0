"""Which visual actions there are, by the name that a tool call has for them; `zoom` says what one is made of."""

from __future__ import annotations

from virl_jax.rollout.actions import zoom

ACTIONS = {zoom.NAME: zoom}
