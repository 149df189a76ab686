"""Plans a pod without one: compiles the real programs for a TPU topology and says what they need.

python launch/plan_pod.py --config=configs/world.py:large --topology=v5p:4x4x4 [--json]

Needs `pip install 'jax[tpu]'`, but no TPU and no weights. Bytes are the compiler's; seconds are
estimates, by the method that worldr1_jax/plan/report.py states.
"""

import itertools
import json
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing here holds a chip

import cli
from absl import flags

TOPOLOGY = flags.DEFINE_string("topology", "v5p:4x4x4", "such as v6e:8x8, v5e:1x1, 2*v5e:16x16")
ROW = flags.DEFINE_bool("row", False, "print the row of a table only")
JSON = flags.DEFINE_bool("json", False, "print JSON only")
PRICE = flags.DEFINE_float(
    "price", 0.0, "of one chip for an hour, for the cost of an update", lower_bound=0
)
ONLY = flags.DEFINE_list("programs", [], "plan these alone, such as rollout,update")
HLO = flags.DEFINE_string("hlo", "", "folder for the compiled programs' text, to read by eye")
SWEEP = flags.DEFINE_bool("sweep", False, "try meshes, remat and windows, and rank them")
CONTEXTS = flags.DEFINE_list("contexts", ["1", "2", "4"], "devices for one video, for --sweep")
REMATS = flags.DEFINE_list("remats", ["full", "attention"], "remat policies, for --sweep")
WINDOWS = flags.DEFINE_list("windows", [], "numbers of window steps, for --sweep")


def main() -> None:
    """Prints a table of the programs, or JSON, or with --sweep a ranking of choices."""
    from worldr1_jax import settings
    from worldr1_jax.plan import report as plan

    config = cli.CONFIG.value
    devices = plan.topology_devices(TOPOLOGY.value)
    if SWEEP.value:
        _sweep(config, devices)
        return
    found = settings.read(config)
    mesh = plan.mesh_for(found, devices)
    programs = plan.plan(found, mesh, only=tuple(ONLY.value), hlo=HLO.value)
    figures = plan.report(TOPOLOGY.value, mesh, programs)
    if PRICE.value:
        figures["cost_per_update"] = figures["chip_hours_per_update"] * PRICE.value
    if JSON.value:
        print(json.dumps(figures, indent=2))
        return
    if ROW.value:
        print(plan.table_row(found.run.variant, TOPOLOGY.value, mesh, programs))
        return
    print(f"{TOPOLOGY.value}: {mesh.size} devices, mesh {dict(mesh.shape)}; all is estimated")
    for p in programs:
        fits = "" if p.hbm_peak_bytes <= p.hbm_limit_bytes else "  DOES NOT FIT"
        terms = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in p.terms.items())
        unknown = f", UNKNOWN: {', '.join(p.unknown)}" if p.unknown else ""
        sent = ", ".join(f"{kind} {size / 1e9:.1f} GB" for kind, size in p.collectives.items())
        print(
            f"{p.name:11} {p.hbm_peak_bytes / 1e9:6.1f} of {p.hbm_limit_bytes / 1e9:.0f} GB, "
            f"{p.hbm_resting_bytes / 1e9:.1f} of it resting{fits}  "
            f"{p.times} x {p.seconds:.2f} ± {p.error:.2f} s ({terms}{unknown})  "
            f"MFU {p.mfu:.1%}  bound: {p.bound}  sent: {sent or 'nothing'}  "
            f"compiled in {p.compile_seconds:.0f} s"
        )
    print(
        f"update: {figures['seconds_per_update']:.0f} ± {figures['error']:.0f} s, "
        f"{figures['chip_hours_per_update']:.1f} chip-hours"
        + (f", {figures['cost_per_update']:.2f} at the price" if PRICE.value else "")
    )


def _whole(flag) -> list[int]:
    """The numbers of a list of them."""
    strange = [text for text in flag.value if not text.isdecimal()]
    if strange:
        raise ValueError(f"--{flag.name} has '{strange[0]}': it has to be whole numbers")
    return [int(text) for text in flag.value]


def _sweep(config, devices) -> None:
    from worldr1_jax import settings
    from worldr1_jax.mesh.make import make_mesh
    from worldr1_jax.plan import report as plan

    rows = []
    windows = _whole(WINDOWS) or [config.algorithm.get("window", 0)]
    for context, remat, window in itertools.product(_whole(CONTEXTS), REMATS.value, windows):
        with config.unlocked():
            config.policy.remat = remat
            if "window" in config.algorithm:
                config.algorithm.window = window
        choice = {"context": context, "remat": remat, "window": window}
        try:
            mesh = make_mesh({"fsdp": -1, "context": context}, devices)
            programs = plan.plan(
                settings.read(config), mesh, only=tuple(ONLY.value or ("rollout", "update"))
            )
        except ValueError as error:
            rows.append({**choice, "fits": False, "why": str(error)})
            continue
        figures = plan.report(TOPOLOGY.value, mesh, programs)
        seconds = figures["seconds_per_update"]
        peak = max(p.hbm_peak_bytes for p in programs)
        fits = peak <= programs[0].hbm_limit_bytes
        rows.append({
            **choice, "fits": fits, "seconds_per_update": seconds, "error": figures["error"],
            "hbm_peak_bytes": peak,
        })  # fmt: skip
    rows.sort(key=lambda row: (not row["fits"], row.get("seconds_per_update", 0.0)))
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    cli.run(main)
