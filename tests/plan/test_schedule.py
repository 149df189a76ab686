"""What is counted of a schedule, by hand."""

import os
import pathlib

from worldr1_jax.plan import schedule

# A grid of 2 x 3 blocks, which the pipeline takes in 2 x 3 + 2 turns, between a first bundle and a
# last. The branch of the first block of the second dimension is two bundles long, that of some data
# one; a loop of 5 turns has two bundles.
TEXT = """
= control target key start
LB: loop body
= control target key end

     0   :  { %s1_s0 = inlined_call_operand.vmem [shape: s8[1,2,2], index: 0, kind: input] }
   0x1 LB: > { %s2_s4 = sphi %s9_s4, %s8_s4 /* phi copy :: iteration index, stage = 1 iter bound = 1 */ } /* Start region 3 */
   0x2   : > { %p1_p1 = scmp.ne.s32.totalorder %s2_s4, 0  ;;  %p2_p2 = scmp.le.s32.totalorder %s5_s5, 0 }
   0x3   : > { %20 = sbr.rel (%p1_p1) target = $region6 }
   0x4   : > { %21 = vst [vmem:[#allocation2] sm:$0xff] %v1_v1 }
   0x5   : > { %22 = vst [vmem:[#allocation2 + $0x8] sm:$0xff] %v1_v1 }
   0x6 PF: > { %23 = sbr.rel (%p2_p2) target = $region7 } /* Start/End empty region 6 */
   0x7   : > { %24 = dma.done.wait /* 
base_bounds: (256, 1)
iteration_bounds: (2, 3)
 */ }
   0x8 LB: >> { %s30_s9 = sadd.s32 1, %s31_s9 } /* Start region 7 */
   0x9   : >> { %p3_p3 = scmp.ge.s32.totalorder %s30_s9, 5  ;;  %25 = sbr.rel (!%p3_p3) target = $region7 }
   0xa   : > { %s40_s1 = sadd.s32 1, %s41_s1 }
   0xb   : > { %p4_p4 = scmp.ge.s32.totalorder %s40_s1, 8 /* loop exit test */  ;;  %26 = sbr.rel (!%p4_p4) target = $region3 }
   0xc   :  { %27 = vsyncpa [#allocation6], 1 }
"""  # noqa: E501 (as the compiler prints it)


def test_bundles_count_as_often_as_they_run():
    grid = 2 * 3 * (7 + 2 * 1 / 3 + 2 * 5)
    assert schedule.read(TEXT) == round(schedule.FACTOR * (2 + grid))
    # Without its store in a spilled register the index is not known, and the branch always taken.
    spilled = TEXT.replace(
        "%p1_p1 = scmp.ne.s32.totalorder %s2_s4", "%p1_p1 = scmp.ne.s32.totalorder %s3_s4"
    )
    assert schedule.read(spilled) == round(schedule.FACTOR * (2 + 2 * 3 * (7 + 2 + 2 * 5)))
    fill = "sst [smem:[#allocation9_spill]] %s2_s4 ;; %s3_s4 = sld [smem:[#allocation9_spill]] }"
    assert schedule.read(spilled.replace("%21 = vst", f"{fill[:-2]} ;; %21 = vst")) == round(
        schedule.FACTOR * (2 + grid)
    )


def test_a_matrix_unit_that_is_asked_for_more_than_it_takes_holds_up_the_core():
    def with_products(*products):
        return TEXT.replace("%s40_s1 = sadd", " ;; ".join([*products, "%s40_s1 = sadd"]))

    first = "%41 = vmatmul.bf16.gmra.mxu0 %v1_v1"
    second = "%42 = vmatmul.mubr.f32.vlgmr.msra.gmra.mrb[0].mxu1 %v1_v1"
    grid = 2 + 2 * 3 * (7 + 2 * 1 / 3 + 2 * 5)
    # 16 rows of bfloat16 a block hold up nothing; 32 do, on a unit that takes a row a cycle.
    assert schedule.read(with_products(first, second)) == round(schedule.FACTOR * grid)
    twice = with_products(first, first, second)
    assert schedule.read(twice) == round(schedule.FACTOR * 2 * 3 * 32)
    assert schedule.read(twice, rows=2) == round(schedule.FACTOR * grid)
    other = with_products(*[second] * 5)
    assert schedule.read(other) == round(schedule.FACTOR * 2 * 3 * 40)


def test_what_one_core_does_alone_takes_it_as_long():
    alone = TEXT.replace(
        "%s1_s0 = inlined",
        "%s17_s18 = sld [smem:[#allocation0]] /* core id */ ;; %s1_s0 = inlined",
    ).replace(
        "%s2_s4 = sphi",
        "%p9_p0 = scmp.ne.s32.totalorder %s17_s18, 0 ;; %27 = sbr.rel (%p9_p0) target = $region4"
        " ;; %s2_s4 = sphi",
    )
    assert schedule.read(alone) == schedule.read(TEXT)


def test_a_loop_of_unknown_turns_is_no_figure():
    assert schedule.read(TEXT.replace("%s30_s9, 5", "%s30_s9, %s31_s9")) is None


def test_schedules_are_those_that_the_compiler_was_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--flag=1 --xla_jf_dump_to={tmp_path}")
    schedule.watch()  # somebody's own
    assert os.environ["LIBTPU_INIT_ARGS"] == f"--flag=1 --xla_jf_dump_to={tmp_path}"
    (tmp_path / "17-my_kernel.1-01-final_bundles.txt").write_text(TEXT)
    (tmp_path / "17-my_kernel.1-00-schedule-analysis_final_bundles.txt").write_text("")
    assert schedule.found({"my_kernel.1", "other"}) == {"my_kernel.1": schedule.read(TEXT)}
    schedule.clear()
    assert list(tmp_path.iterdir())
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--flag=1")
    schedule.watch()
    assert os.environ["LIBTPU_INIT_ARGS"].startswith("--flag=1 --xla_jf_dump_to=")
    folder = pathlib.Path(os.environ["LIBTPU_INIT_ARGS"].split("dump_to=")[1].split()[0])
    (folder / "17-my_kernel.1-01-final_bundles.txt").write_text(TEXT)
    assert set(schedule.found({"my_kernel.1"})) == {"my_kernel.1"}
    schedule.clear()
    assert schedule.found({"my_kernel.1"}) == {}
