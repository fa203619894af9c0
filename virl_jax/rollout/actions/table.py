"""The visual actions, by the names that tool calls have for them; `zoom` says what one consists of."""

from __future__ import annotations

from virl_jax.rollout.actions import zoom

ACTIONS = {zoom.NAME: zoom}
