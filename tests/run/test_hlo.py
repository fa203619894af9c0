"""Collectives and kernels in the text of compiled programs: texts written by hand, and a real one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from virl_jax.model import sharding
from virl_jax.run import hlo

GPU = """HloModule m

%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[], bf16[8,16]) parameter(0)
  %ags = (bf16[1,16]{1,0}, bf16[8,16]{1,0}) all-gather-start(%x), channel_id=1, replica_groups=[1,8]<=[8]
  %agd = bf16[8,16]{1,0} all-gather-done(%ags)
  ROOT %t = (s32[], bf16[8,16]) tuple(%i, %agd)
}

%cond (p: (s32[], bf16[8,16])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: bf16[1,16]) -> bf16[8,16] {
  %w = (s32[], bf16[8,16]) while(%t0), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"28"}}
  %open = (s32[], bf16[8,16]) while(%t1), condition=%cond, body=%body
  %ar = f32[10]{0} all-reduce(%y), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add
  %rss = ((f32[64]{0}), f32[8]{0}) reduce-scatter-start(%z), channel_id=3, replica_groups=[1,8]<=[8]
  ROOT %r = bf16[8,16] custom-call(%w), custom_call_target="__cudnn$fmhaSoftmax"
}
"""
GATHERED = 8 * 16 * 2 * 7 / 8  # an eighth of the result was on the device before


def test_bytes_that_a_device_receives():
  found = hlo.traffic(GPU)
  assert found.kinds == {"all-gather": 29 * GATHERED, "all-reduce": 2 * 40 / 2, "reduce-scatter": 7 * 32}
  assert found.open_kinds == {"all-gather": GATHERED}  # one pass of a loop of unknown length
  assert found.largest == 8 * 16 * 2 and found.total == sum(found.kinds.values())
  assert hlo.kernels(GPU) == ["cudnn"] and hlo.kernels("") == []


def test_a_kernel_is_known_by_its_call():
  named = '%a = f32[8] {}(%b), {}metadata={{op_name="jit(f)/cache_attend_triton/pallas_call"}}'
  assert hlo.kernels(named.format("custom-call", 'custom_call_target="__gpu$xla.gpu.triton", ')) == ["cache"]
  assert hlo.kernels(named.format("add", "")) == []  # one that is interpreted


TPU = """HloModule m

%fused.1 (p: bf16[1,56]) -> (bf16[1,56], bf16[64,56]) {
  %ag = bf16[64,56]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['a'=64,'b'=1] {'a'}
  ROOT %s = (bf16[1,56], bf16[64,56]) custom-call(%ag), custom_call_target="AsyncCollectiveStart", more={metadata={
}}, metadata={op_name="x"}
}

%fused.2 (p: bf16[1,56]) -> bf16[64,56] {
  %ag.2 = bf16[64,56]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=64,'b'=1] {'a'}
  ROOT %d = bf16[64,56] custom-call(%ag.2), custom_call_target="AsyncCollectiveDone"
}

%body (p: s32[]) -> s32[] {
  %start = (bf16[1,56], bf16[64,56]) fusion(%a), kind=kCustom, calls=%fused.1
  %done = bf16[64,56] fusion(%start), kind=kCustom, calls=%fused.2
  ROOT %i = s32[] add(%p, %one)
}

%cond (p: s32[]) -> pred[] {
  %n = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%p, %n), direction=LT
}

ENTRY %main (a: bf16[1,56]) -> s32[] {
  ROOT %w = s32[] while(%zero), condition=%cond, body=%body
}
"""


def test_a_tpu_s_asynchronous_collectives_stand_in_several_places_and_count_once():
  assert hlo.traffic(TPU).kinds == {"all-gather": 5 * 64 * 56 * 2 * 63 // 64}


WINDOWED = """HloModule m

%begins (p: bf16[1,56]) -> (bf16[1,56], bf16[64,56]) {
  %ag = bf16[64,56]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=8,'b'=1] {'a'}
  ROOT %s = (bf16[1,56], bf16[64,56]) custom-call(%ag), custom_call_target="AsyncCollectiveStart"
}

%goes_on (p: bf16[1,56]) -> (bf16[1,56], bf16[64,56]) {
  %ag.2 = bf16[64,56]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=8,'b'=1] {'a'}
  ROOT %s = (bf16[1,56], bf16[64,56]) custom-call(%ag.2), custom_call_target="AsyncCollectiveStep"
}

%wide.windowed_dot_general_body_ag.1 (p: (bf16[4,16], u32[], bf16[4,16])) -> (bf16[4,16], u32[], bf16[4,16]) {
  %two = u32[]{:T(128)} constant(2)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  %right = (bf16[4,16]{1,0}, bf16[4,16]{1,0}, u32[]) collective-permute-start(%a), channel_id=1
  %done = bf16[4,16]{1,0} collective-permute-done(%right)
  %again = (bf16[4,16]{1,0}, bf16[4,16]{1,0}, u32[]) collective-permute-start(%done), channel_id=2
  %done.2 = bf16[4,16]{1,0} collective-permute-done(%again)
  %step = (bf16[1,56], bf16[64,56]) fusion(%x), kind=kCustom, calls=%goes_on
  %next = u32[]{:T(128)} add(%i, %two), metadata={op_name="x"}
  ROOT %t = (bf16[4,16]{1,0}, u32[]{:T(128)}, /*index=2*/bf16[4,16]{1,0}) tuple(%done.2, %next, /*index=2*/%b)
}

%wide.windowed_dot_general_cond_ag.1 (p: (bf16[4,16], u32[], bf16[4,16])) -> pred[] {
  %n = u32[]{:T(128)} constant(8)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: bf16[4,16]) -> bf16[4,16] {
  %start = (bf16[1,56], bf16[64,56]) fusion(%a), kind=kCustom, calls=%begins
  ROOT %w = (bf16[4,16], u32[], bf16[4,16]) while(%t0), condition=%wide.windowed_dot_general_cond_ag.1, \
body=%wide.windowed_dot_general_body_ag.1
}
""".replace("\\\n", "")


def test_a_product_whose_parts_arrive_in_a_loop_of_its_own():
  found = hlo.traffic(WINDOWED)
  # Eight steps in four passes of two permutes each; the collective under way meanwhile began before the loop: it counts
  # once.
  assert found.kinds == {"collective-permute": 8 * 4 * 16 * 2, "all-gather": 64 * 56 * 2 * 7 / 8}
  assert not found.open_kinds  # the loop's length is known


@pytest.mark.parametrize("turns", [1, 6])
def test_a_real_program(turns):
  mesh = sharding.make(1, 8, 1)
  whole, split = sharding.replicated(mesh), sharding.rows(mesh)

  def gathers(x):
    def body(carry, _):
      return jax.lax.with_sharding_constraint(jnp.sin(jax.lax.with_sharding_constraint(carry, whole)), split), None

    return jax.lax.scan(body, x, None, length=turns)[0]

  x = jax.device_put(np.ones((64, 32), np.float32), split)
  compiled = jax.jit(gathers, out_shardings=split).lower(x).compile()
  if "all-gather" in compiled.as_text():  # the partitioner may see that it is not needed
    assert hlo.traffic(compiled.as_text()).kinds["all-gather"] == turns * 64 * 32 * 4 * 7 / 8
  y = jax.jit(lambda x: jnp.broadcast_to(x.sum(), (8,)), out_shardings=whole).lower(x).compile()
  assert hlo.traffic(y.as_text()).kinds["all-reduce"] == 2 * 4 * 7 / 8 == hlo.traffic(y.as_text()).total
