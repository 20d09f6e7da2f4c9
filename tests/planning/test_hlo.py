"""The reader of compiled programs: against XLA's own count of bytes, and on text whose content is known."""

import jax
import jax.numpy as jnp
import pytest

from codi_jax.planning.hlo import Census, Traffic, census, parse

# As the compiler for TPUs writes it, shortened: a loop of four steps, a weight that is gathered in the background
# (start and end name the same channel), buffers in on-chip memory (S(1)), and gradients that are summed.
TPU = """
HloModule jit_f, is_scheduled=true, entry_computation_layout={(bf16[4,256,512]{2,1,0:T(8,128)(2,1)})->f32[]}

%start (p: bf16[1,256,512]) -> (bf16[1,512,512], bf16[1,256,512]) {
  %p.1 = bf16[1,256,512]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[1,512,512]{2,1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=10, \
replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=2], device_ids=([2,2]T(1,0)) {'axis_0'}, dimensions={1}
  ROOT %custom-call.1 = (bf16[1,512,512]{2,1,0}, bf16[1,256,512]{2,1,0}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%done (p: bf16[1,256,512]) -> bf16[1,512,512] {
  %p.2 = bf16[1,256,512]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.2 = bf16[1,512,512]{2,1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=10, \
replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=2], device_ids=([2,2]T(1,0)) {'axis_0'}, dimensions={1}
  ROOT %custom-call.2 = bf16[1,512,512]{2,1,0:T(8,128)(2,1)S(1)} custom-call(%all-gather.2), \
custom_call_target="AsyncCollectiveDone"
}

%turned (p: bf16[2,8,8,512]) -> bf16[8,2,8,512] {
  %p.3 = bf16[2,8,8,512]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %copy.3 = bf16[2,8,8,512]{3,1,2,0:T(8,128)(2,1)} copy(%p.3)
  ROOT %bitcast.3 = bf16[8,2,8,512]{3,0,2,1:T(8,128)(2,1)} bitcast(%copy.3)
}

%sliced (p0: bf16[4,256,512], p1: s32[]) -> bf16[1,256,512] {
  %p.4 = bf16[4,256,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.5 = s32[]{:T(128)S(6)} parameter(1)
  %constant.4 = s32[]{:T(128)} constant(0)
  ROOT %dynamic-slice.4 = bf16[1,256,512]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%p.4, %p.5, %constant.4, \
%constant.4), dynamic_slice_sizes={1,256,512}
}

%folded (p0: bf16[2,8,8,512], p1: bf16[3,3,512,512]) -> bf16[2,8,8,512] {
  %p.6 = bf16[2,8,8,512]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %p.7 = bf16[3,3,512,512]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %convolution.1 = bf16[2,8,8,512]{3,2,1,0:T(8,128)(2,1)} convolution(%p.6, %p.7), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
}

%body (s: (s32[], bf16[2,8,8,512], bf16[4,256,512])) -> (s32[], bf16[2,8,8,512], bf16[4,256,512]) {
  %s = (s32[]{:T(128)}, bf16[2,8,8,512]{3,2,1,0}, /*index=2*/bf16[4,256,512]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %z = bf16[2,8,8,512]{3,2,1,0:T(8,128)(2,1)} get-tuple-element(%s), index=1
  %w = bf16[4,256,512]{2,1,0:T(8,128)(2,1)} get-tuple-element(%s), index=2
  %slice = bf16[1,256,512]{2,1,0:T(8,128)(2,1)S(1)} fusion(%w, %i), kind=kLoop, calls=%sliced
  %gather.start = (bf16[1,512,512]{2,1,0}, bf16[1,256,512]{2,1,0}) fusion(%slice), kind=kCustom, calls=%start
  %whole = bf16[1,512,512]{2,1,0:T(8,128)(2,1)S(1)} fusion(%slice), kind=kCustom, calls=%done
  ROOT %next = (s32[]{:T(128)}, bf16[2,8,8,512]{3,2,1,0}, bf16[4,256,512]{2,1,0}) tuple(%i, %z, %w)
}

%condition (s: (s32[], bf16[2,8,8,512], bf16[4,256,512])) -> pred[] {
  %s.2 = (s32[]{:T(128)}, bf16[2,8,8,512]{3,2,1,0}, bf16[4,256,512]{2,1,0}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%s.2), index=0
  %four = s32[]{:T(128)} constant(4)
  ROOT %less = pred[]{:T(512)} compare(%i.2, %four), direction=LT
}

ENTRY %main (w: bf16[4,256,512], k: bf16[3,3,512,512], x: bf16[2,8,8,512]) -> bf16[2,8,8,512] {
  %w.1 = bf16[4,256,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %k.1 = bf16[3,3,512,512]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %x.1 = bf16[2,8,8,512]{3,2,1,0:T(8,128)(2,1)} parameter(2)
  %prefetch = (bf16[3,3,512,512]{3,2,1,0:S(1)}, bf16[3,3,512,512]{3,2,1,0}, u32[]{:S(2)}) copy-start(%k.1)
  %k.2 = bf16[3,3,512,512]{3,2,1,0:T(8,128)(2,1)S(1)} copy-done(%prefetch)
  %turn = bf16[8,2,8,512]{3,0,2,1:T(8,128)(2,1)} fusion(%x.1), kind=kLoop, calls=%turned
  %y = bf16[2,8,8,512]{3,2,1,0:T(8,128)(2,1)} fusion(%x.1, %k.2), kind=kOutput, calls=%folded
  %half = f32[2,8,8,512]{3,2,1,0:T(8,128)} convert(%y)
  %zero = s32[]{:T(128)} constant(0)
  %begin = (s32[]{:T(128)}, bf16[2,8,8,512]{3,2,1,0}, bf16[4,256,512]{2,1,0}) tuple(%zero, %y, %w.1)
  %loop = (s32[]{:T(128)}, bf16[2,8,8,512]{3,2,1,0}, bf16[4,256,512]{2,1,0}) while(%begin), condition=%condition, \
body=%body
  %z.1 = bf16[2,8,8,512]{3,2,1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
  %kernel = bf16[2,8,8,512]{3,2,1,0:T(8,128)(2,1)} custom-call(%z.1), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/flash_attention"}
  ROOT %sum = bf16[2,8,8,512]{3,2,1,0:T(8,128)(2,1)} all-reduce(%kernel), channel_id=1, \
replica_groups=[1,4]<=[4], to_apply=%add
}
""".replace("\\\n", "")
WEIGHT = 2 * 256 * 512  # bytes of a fourth of the weights in bfloat16
PICTURE = 2 * 2 * 8 * 8 * 512
KERNEL = 2 * 9 * 512 * 512


@pytest.fixture(scope="module")
def found() -> Census:
    return census(parse(TPU), devices=4)


def test_collectives(found: Census):
    """Of two devices, each sends its half once in each of four steps; a sum of four is sent almost twice."""
    assert found.collectives == {
        "all-gather": Traffic(4, 4 * WEIGHT),
        "all-reduce": Traffic(1, 2 * PICTURE * 3 // 4),
    }


def test_bytes_in_main_memory(found: Census):
    """The prefetched kernel once; in each step a slice of the weights, not all; nothing that stays on the chip."""
    turn, conv, kernel, total = 2 * PICTURE, 2 * PICTURE, 2 * PICTURE, 2 * PICTURE
    convert = PICTURE + 2 * PICTURE
    gathered = 2 * 512 * 512 + WEIGHT  # what the start of the gathering hands on, as its type says
    counter = 4
    assert found.bytes_moved == KERNEL + turn + conv + convert + kernel + total + 4 * (WEIGHT + gathered + counter)


def test_what_only_moves_or_converts(found: Census):
    assert (found.moves, found.bytes_of_moves) == (1, 2 * PICTURE)
    assert (found.converts, found.bytes_of_converts) == (1, 3 * PICTURE)


def test_kernels_and_convolutions(found: Census):
    assert found.kernels == {"flash_attention": 1}
    assert (found.convolutions, found.convolutions_not_nhwc) == (1, 0)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("bf16[2,8,8,512]{3,2,1,0:T(8,128)(2,1)} convolution", "bf16[2,8,8,512]{2,1,3,0:T(8,128)(2,1)} convolution"),
        ("%p.6 = bf16[2,8,8,512]{3,2,1,0", "%p.6 = bf16[2,8,8,512]{2,1,3,0"),
        ("dim_labels=b01f_01io->b01f", "dim_labels=bf01_01io->bf01"),
    ],
)
def test_convolutions_whose_features_are_apart(old: str, new: str):
    assert old in TPU
    assert census(parse(TPU.replace(old, new)), 4).convolutions_not_nhwc == 1


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3}}", 2),
        ("[2,2]<=[4]", 2),
        ("[2,2]<=[2,2]T(1,0)", 2),
        ("{}", 4),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_0','axis_1'}", 4),
    ],
)
def test_groups_of_devices(groups: str, size: int):
    text = TPU.replace("replica_groups=[1,4]<=[4]", f"replica_groups={groups}")
    assert census(parse(text), 4).collectives["all-reduce"].bytes == round(2 * PICTURE * (size - 1) / size)


def test_the_compilers_own_note_of_a_loop():
    text = TPU.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert census(parse(text), 4).collectives["all-gather"].count == 7


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="has no entry"):
        parse("no module")


# ---- Programs of this machine


def of_program(function, *arrays) -> tuple[Census, float]:
    compiled = jax.jit(function).lower(*arrays).compile()
    return census(parse(compiled.as_text()), 1), compiled.cost_analysis()["bytes accessed"]


def test_bytes_as_xla_counts_them():
    def f(x, k, w):
        x = jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.tanh(x) @ w + x.sum()

    found, by_xla = of_program(f, jnp.ones((2, 16, 16, 8)), jnp.ones((3, 3, 8, 8)), jnp.ones((8, 32)))
    assert found.bytes_moved == pytest.approx(by_xla, rel=0.05)
    assert found.convolutions == 1


def test_a_loop_counts_as_often_as_it_runs():
    def f(x, w):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0]

    few, many = (of_program(f, jnp.ones((4, 64)), jnp.ones((n, 64, 64)))[0].bytes_moved for n in (10, 100))
    assert 7 < many / few < 11


def test_transposes_are_found():
    found, _ = of_program(lambda x: x.T, jnp.ones((128, 64)))
    assert (found.moves, found.bytes_of_moves) == (1, 2 * 4 * 128 * 64)
