"""What is read from a compiled module, and the figures made of it, by hand."""

import itertools
import os
import types

import pytest

from worldr1_jax.mesh import compiler
from worldr1_jax.mesh.chips import Chip, Links
from worldr1_jax.plan import hlo as plan_hlo
from worldr1_jax.plan import report as plan
from worldr1_jax.plan import splat_cost

MODULE = """HloModule jit_f, is_scheduled=true

%fused (p: bf16[8,128]) -> bf16[8,128] {
  ROOT %p = bf16[8,128]{1,0} parameter(0)
}

%cond (arg: (s32[], bf16[8,128])) -> pred[] {
  %arg = (s32[], bf16[8,128]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(40)
  %i = s32[] get-tuple-element(%arg), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (arg: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %arg.1 = (s32[], bf16[8,128]{1,0}) parameter(0)
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%arg.1), index=1
  %w = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%x), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %fusion.1 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%x, %w), kind=kOutput, calls=%fused, metadata={op_name="jit(f)/while/body/dot"}, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %splash_mha_fwd.1 = bf16[2,256,128]{2,1,0:T(8,128)(2,1)} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block": 1
}}, metadata={op_name="jit(f)/kernel"}
  ROOT %out = (s32[], bf16[8,128]{1,0}) tuple(%i, %fusion.1)
}

ENTRY %main (p0: bf16[8,128]) -> bf16[8,128] {
  %p0 = bf16[8,128]{1,0} parameter(0)
  %t = (s32[], bf16[8,128]{1,0}) tuple(%zero, %p0)
  %while.1 = (s32[], bf16[8,128]{1,0}) while(%t), condition=%cond, body=%body
  ROOT %r = bf16[8,128]{1,0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501 (as the compiler prints it)
SHAPES = "  %q = bf16[2,256,128]{2,1,0} parameter(1)\n  %k = bf16[2,512,128]{2,1,0} parameter(2)\n"
TEXT = MODULE.replace("  %arg.1 =", SHAPES + "  %arg.1 =")


@pytest.fixture
def ops():
    return {op.kind: op for op in plan_hlo.read(TEXT)}


def test_loops_are_multiplied_and_the_compilers_cycles_are_read(ops):
    assert (ops["xla"].times, ops["xla"].cycles) == (40, 1000)
    assert ops["xla"].source == "jit(f)/while/body/dot"
    # x and the result; the gathered weights lie in the core's memory.
    assert ops["xla"].bytes == 2 * (8 * 128 * 2)


def test_collectives_hide_behind_what_runs_meanwhile_and_share_it():
    asynchronous = """
ENTRY %main (p0: bf16[8,128]) -> bf16[8,128] {
  %p0 = bf16[8,128]{1,0} parameter(0)
  %copy-start = bf16[8,128]{1,0} copy-start(%p0)
  %all-to-all-start.1 = (bf16[8,128]{1,0}, bf16[8,128]{1,0}) all-to-all-start(%p0), replica_groups={{0,1,2,3}}, dimensions={0}
  %fusion.1 = bf16[8,128]{1,0} fusion(%p0), kind=kLoop, backend_config={"estimated_cycles":"1000"}
  %all-gather-start = (bf16[8,128]{1,0}, bf16[32,128]{1,0}) all-gather-start(%p0), replica_groups={{0,1,2,3}}, dimensions={0}
  %fusion.2 = bf16[8,128]{1,0} fusion(%p0), kind=kLoop, backend_config={"estimated_cycles":"600"}
  %fusion.3 = bf16[8,128]{1,0} fusion(%p0), kind=kLoop, backend_config={"estimated_cycles":"9223372036854775807"}
  %reduce-scatter-start = bf16[8,128]{1,0} reduce-scatter-start(%p0), replica_groups={{0,1,2,3}}, dimensions={0}
  %fusion.4 = bf16[8,128]{1,0} fusion(%p0), kind=kLoop, backend_config={"estimated_cycles":"10"}
  %all-to-all-done.1 = bf16[8,128]{1,0} all-to-all-done(%all-to-all-start.1)
  %all-gather-done = bf16[32,128]{1,0} all-gather-done(%all-gather-start)
  ROOT %copy-done = bf16[8,128]{1,0} copy-done(%copy-start)
}
"""  # noqa: E501
    found = {op.kind: op for op in plan_hlo.read(asynchronous) if op.kind != "xla"}
    assert found["all-to-all"].bytes == 8 * 128 * 2 * 3 // 4
    assert (found["all-to-all"].cover, found["all-gather"].cover) == (1305, 305)


def test_gathers_scatters_and_sorts_cost_by_rows_and_keys():
    moving = """
%gathers (p: f32[500,10], i: s32[64,1]) -> f32[64,10] {
  %p = f32[500,10]{1,0} parameter(0)
  %i = s32[64,1]{1,0} parameter(1)
  ROOT %g = f32[64,10]{1,0} gather(%p, %i), offset_dims={1}, collapsed_slice_dims={0}, start_index_map={0}, index_vector_dim=1, slice_sizes={1,10}
}

%scatters (p.1: f32[500,10], i.1: s32[32,1], u: f32[32,10]) -> f32[500,10] {
  %p.1 = f32[500,10]{1,0} parameter(0)
  %i.1 = s32[32,1]{1,0} parameter(1)
  %u = f32[32,10]{1,0} parameter(2)
  ROOT %s = f32[500,10]{1,0} scatter(%p.1, %i.1, %u), update_window_dims={1}, inserted_window_dims={0}, scatter_dims_to_operand_dims={0}, index_vector_dim=1, to_apply=%add
}

ENTRY %main (p0: f32[500,10]) -> f32[500,10] {
  %p0 = f32[500,10]{1,0} parameter(0)
  %keys = f32[3,2048]{1,0} parameter(3)
  %gather_fusion = f32[64,10]{1,0} fusion(%p0, %at), kind=kCustom, calls=%gathers
  %scatter_fusion = f32[500,10]{1,0} fusion(%p0, %at, %rows), kind=kCustom, calls=%scatters, backend_config={"estimated_cycles":"9223372036854775807"}
  %sort.1 = (f32[3,2048]{1,0}, s32[3,2048]{1,0}) sort(%keys, %iota), dimensions={1}, to_apply=%less
  %turned = f32[2048,3]{1,0} parameter(4)
  %sort.2 = f32[2048,3]{1,0} sort(%turned), dimensions={0}, to_apply=%less
  ROOT %c = f32[500,10]{1,0} copy(%scatter_fusion)
}
"""  # noqa: E501
    found = {op.name: op.cycles for op in plan_hlo.read(moving)}
    assert found == {
        "gather_fusion": int(64 * splat_cost.GATHER_CYCLES),
        "scatter_fusion": int(32 * splat_cost.GATHER_CYCLES),
        "sort.1": int(3 * splat_cost.sort_cycles(2048)),
        "sort.2": int(3 * splat_cost.sort_cycles(2048)),
    }


def test_collectives_count_what_a_device_sends(ops):
    gather = ops["all-gather"]
    assert (gather.times, gather.group, gather.bytes) == (40, 8, 64 * 128 * 2 * 7 // 8)
    assert plan_hlo.sent("all-reduce", 800, 8) == 2 * 700
    assert plan_hlo.sent("reduce-scatter", 100, 8) == 700
    assert plan_hlo.sent("all-gather", 100, 1) == 0


def test_a_kernel_takes_its_schedule_and_equal_ones_are_scheduled_once():
    call = next(line for line in TEXT.splitlines() if "%splash_mha_fwd.1" in line)
    twin = call.replace("fwd.1", "fwd.2")
    body = ' backend_config={"custom_call_config":{"body":"TUzv"}}, custom_call_target'
    text = TEXT.replace(call, f"{twin}\n{call}").replace(" custom_call_target", body)
    assert plan_hlo.kernel_names(text) == {"splash_mha_fwd.1", "splash_mha_fwd.2"}
    found = [
        op for op in plan_hlo.read(text, kernels={"splash_mha_fwd.1": 70}) if "splash" in op.name
    ]
    assert [(op.kind, op.cycles, op.times) for op in found] == [("kernel", 70, 40)] * 2
    # Without a schedule nothing is made up.
    (unknown,) = [op for op in plan_hlo.read(TEXT) if "splash" in op.name]
    assert (unknown.kind, unknown.cycles) == ("unknown", 0)
    assert unknown.bytes == (2 * 256 + 2 * 256 + 2 * 2 * 512) * 128 * 2


def test_of_a_stack_a_layer_moves_its_own_slice():
    text = """
%layer (s: bf16[40,8,128], i: s32[], x: bf16[8,128]) -> bf16[8,128] {
  %s = bf16[40,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = bf16[8,128]{1,0} parameter(2)
  %w = bf16[1,8,128]{2,1,0} dynamic-slice(%s, %i, %i, %i), dynamic_slice_sizes={1,8,128}
  ROOT %sum = bf16[8,128]{1,0} add(%x, %w)
}

%keep (s.1: bf16[40,8,128], x.1: bf16[1,8,128], i.1: s32[]) -> bf16[40,8,128] {
  %s.1 = bf16[40,8,128]{2,1,0} parameter(0)
  %x.1 = bf16[1,8,128]{2,1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  ROOT %new = bf16[40,8,128]{2,1,0} dynamic-update-slice(%s.1, %x.1, %i.1, %i.1, %i.1)
}

ENTRY %main (p0: bf16[40,8,128], p1: s32[], p2: bf16[8,128], p3: bf16[1,8,128]) -> bf16[8,128] {
  %p0 = bf16[40,8,128]{2,1,0} parameter(0)
  %p1 = s32[]{:S(6)} parameter(1)
  %p2 = bf16[8,128]{1,0} parameter(2)
  %p3 = bf16[1,8,128]{2,1,0} parameter(3)
  %fusion.1 = bf16[8,128]{1,0} fusion(%p0, %p1, %p2), kind=kLoop, calls=%layer, backend_config={"estimated_cycles":"10"}
  ROOT %fusion.2 = bf16[40,8,128]{2,1,0} fusion(%p0, %p3, %p1), kind=kLoop, calls=%keep, backend_config={"estimated_cycles":"10"}
}
"""  # noqa: E501
    layer = 8 * 128 * 2
    found = {op.name: op.bytes for op in plan_hlo.read(text)}
    assert found == {"fusion.1": 3 * layer, "fusion.2": 2 * layer}


def test_what_a_sparse_core_sends_counts_and_hides_behind_kernels():
    text = """
%sent (q.1: bf16[8,128]) -> bf16[32,128] {
  %q.1 = bf16[8,128]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[32,128]{1,0} all-gather(%q.1), replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (p0: bf16[8,128]) -> bf16[32,128] {
  %p0 = bf16[8,128]{1,0} parameter(0)
  %call-start = ((bf16[8,128]{1,0}), bf16[32,128]{1,0}, u32[]) call-start(%p0), to_apply=%sent
  %splash_mha_fwd.1 = bf16[8,128]{1,0} custom-call(%p0), custom_call_target="tpu_custom_call"
  ROOT %call-done = bf16[32,128]{1,0} call-done(%call-start)
}
"""  # noqa: E501
    gather, _ = plan_hlo.read(text, kernels={"splash_mha_fwd.1": 700})
    assert (gather.kind, gather.bytes, gather.cover) == ("all-gather", 32 * 128 * 2 * 3 // 4, 700)


def test_the_compilers_flags_are_added_once_and_say_how_much_memory_a_kernel_has(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    assert compiler.scoped_memory("v5p") == 16 << 20
    compiler.set_flags()
    compiler.set_flags()
    assert os.environ["LIBTPU_INIT_ARGS"].count("xla_tpu_scoped_vmem_limit_kib") == 1
    assert compiler.scoped_memory("v5p") == 48 << 20 and compiler.scoped_memory("v4") == 16 << 20
    longer = "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=false"  # than another's name
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"{longer} --xla_tpu_scoped_vmem_limit_kib=20000")
    compiler.set_flags()
    args = os.environ["LIBTPU_INIT_ARGS"].split()
    assert longer in args and "--xla_tpu_enable_async_collective_fusion=true" in args
    assert len(args) == len(compiler.FLAGS)
    assert compiler.scoped_memory("v5p") == 20000 << 10


def test_a_loop_without_an_end_is_an_error():
    with pytest.raises(ValueError, match="no known number of turns"):
        plan_hlo.read(TEXT.replace("constant(40)", "parameter(1)"))


def test_a_loop_may_count_without_a_sign():
    # as the compiler's own loops do, that gather a matrix while it is multiplied
    assert (
        plan_hlo.read(TEXT.replace("s32[]{:T(128)} constant(40)", "u32[]{:T(128)} constant(40)"))[
            -1
        ].times
        == plan_hlo.read(TEXT)[-1].times
    )


def test_turns_that_depend_on_the_data_are_those_stated():
    ops = plan_hlo.read(TEXT.replace("constant(40)", "parameter(1)"), turns=7)
    assert {op.times for op in ops} == {7}


def test_a_bound_is_no_number_of_turns():
    """A loop that also ends when the data says so, such as the renderer's rounds."""
    read = "  %{0} = s32[] get-tuple-element(%arg.2), index={1}\n"
    both = read.format("g", 0) + read.format("d", 1)
    head = next(line for line in TEXT.splitlines() if line.startswith("%cond"))
    ops = plan_hlo.read(TEXT.replace(head, head + "\n" + both), turns=7)
    assert {op.times for op in ops} == {7}


def test_the_report_has_the_keys_of_the_issue_and_counts_every_run():
    rows = [
        plan.Program(
            name,
            times,
            10,
            4,
            20,
            1e12,
            5,
            6,
            seconds,
            seconds / 4,
            "xla",
            0.5,
            1.0,
            {"xla": seconds},
            {},
        )
        for name, times, seconds in (("rollout", 1, 8.0), ("render", 3, 2.0), ("restore", 0, 9.0))
    ]
    device = types.SimpleNamespace(device_kind="TPU v5")
    mesh = types.SimpleNamespace(
        size=64, devices=types.SimpleNamespace(flat=[device]), shape={"fsdp": 64, "context": 1}
    )
    found = plan.report("v5p:4x4x4", mesh, rows)
    assert set(found) == {
        "topology", "devices", "programs", "seconds_per_update", "error", "chip_hours_per_update"
    }  # fmt: skip
    assert set(found["programs"][0]) == {
        "name", "hbm_peak_bytes", "hbm_limit_bytes", "flops", "hbm_bytes", "ici_bytes", "seconds",
        "error", "bound", "mfu", "compile_seconds", "unknown",
    }  # fmt: skip
    assert (found["seconds_per_update"], found["error"]) == (14.0, 3.5)
    assert found["chip_hours_per_update"] == pytest.approx(14 * 64 / 3600)
    assert [row["seconds"] for row in found["programs"]] == [8.0, 6.0, 9.0]
    assert found["programs"][1]["flops"] == 3e12
    assert plan.table_row("large", "v5p:4x4x4", mesh, rows) == (
        "| large | v5p:4x4x4 | fsdp 64 | rollout | 0.0 of 0.0 GB | 14 ± 4 s | 0.2 | 50% / - | 3 s |"
    )


def test_figures_of_a_program():
    chip, links = Chip(16e9, 100e12, 1e12, 50e9, closes=16, clock=1e9), Links(((8, False),))

    def made(kernels):
        ops = plan_hlo.read(TEXT, kernels=kernels)
        return plan.program("p", ops, chip, links, 1e9, products=5.0, peak=123, compile_seconds=1)

    known = made({"splash_mha_fwd.1": 3000})
    wanted = {
        "xla": 40 * 1000 / 1e9, "moving": 0.0, "kernels": 40 * 3000 / 1e9,
        "interconnect": 40 * 14336 / 50e9,
    }  # fmt: skip
    assert known.terms == pytest.approx(wanted)
    assert known.seconds == pytest.approx(sum(wanted.values()))
    assert known.error == pytest.approx(sum(plan.ERRORS[name] * s for name, s in wanted.items()))
    assert (known.bound, known.unknown, known.flops) == ("kernels", (), 5.0)
    assert known.mfu == pytest.approx(1e9 / (known.seconds * 100e12))
    lower = made({})
    assert lower.unknown == ("splash_mha_fwd.1",)
    assert lower.terms["kernels"] == pytest.approx(40 * (4 * 256 + 4 * 512) * 256 / 1e12)


def test_links_of_a_slice():
    """Lines have one link at their end, rings two; half of everything crosses a line's middle."""

    def devices(kind, *sizes, cores=1):
        places = list(itertools.product(*(range(n) for n in sizes))) * cores
        return [types.SimpleNamespace(device_kind=kind, coords=place) for place in places]

    square = Links.of(devices("TPU v6 lite", 8, 8, 1))
    assert square == Links(((8, False), (8, False)))
    assert square.seconds("all-gather", 900, 64, link=90) == 5  # both ways out of a corner
    assert square.seconds("all-gather", 900, 8, link=90) == 10
    assert square.seconds("all-to-all", 700, 8, link=100) == 16  # 800 bytes, 8 / 4 of them
    cube = Links.of(devices("TPU v5p", 4, 4, 4))
    assert cube.seconds("all-gather", 600, 64, link=100) == 1
    assert cube.seconds("all-gather", 600, 2, link=100) == 6  # half of a ring is a line
    assert cube.seconds("collective-permute", 600, 64, link=100) == 6
    pair = Links.of(devices("TPU7x", 2, 2, 1, cores=2))
    assert pair == Links(((2, False), (2, False)), shared=2)
    assert pair.seconds("all-gather", 600, 8, link=100) == 6


def test_the_compiler_is_told_what_the_chip_can_do(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    v5e, v6e, cpu = (
        types.SimpleNamespace(platform=platform, device_kind=kind)
        for platform, kind in (("tpu", "TPU v5 lite"), ("tpu", "TPU v6 lite"), ("cpu", "cpu"))
    )
    assert compiler.compiler_options(v5e) == {}  # where asynchronous exchanges end the compilation
    assert compiler.compiler_options(v6e) == compiler.EXCHANGES
    assert compiler.compiler_options(v6e, True) == compiler.EXCHANGES | compiler.CONVOLUTIONS
    assert compiler.compiler_options(cpu, True) == {}
    # Where the environment says otherwise, it is left alone.
    compiler.set_flags()
    assert compiler.compiler_options(v6e, True) == compiler.EXCHANGES | compiler.CONVOLUTIONS
    own = "--xla_tpu_enable_async_all_to_all=false --xla_tpu_scoped_vmem_limit_kib=20000"
    monkeypatch.setenv("LIBTPU_INIT_ARGS", own)
    assert compiler.compiler_options(v6e, True) == {}


@pytest.mark.parametrize(
    "name, words",
    [
        ("v9:2x2", "of no chip known here: v4"),
        ("v5e", "is none: give one as"),
        ("x*v5e:4x4", "is none: give one as"),
        ("0*v5e:4x4", "is none: give one as"),
        ("-1*v5e:4x4", "is none: give one as"),  # which was planned as one slice
        ("v5e:1000x1000", "more than 65536 chips"),
        ("100000*v5e:16x16", "more than 65536 chips"),  # which took minutes
    ],
)
def test_a_topology_that_is_none_is_refused_before_it_is_described(name, words):
    with pytest.raises(ValueError, match=words):
        plan.topology_devices(name)
