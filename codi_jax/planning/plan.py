"""The plan of a program: does it fit, how fast will it be, what would help."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from codi_jax.planning.chips import Chip
from codi_jax.planning.programs import Program

EFFICIENCY = 0.5
"""The share of the roofline's speed that estimates assume: large programs reach 0.4 to 0.6 of it."""

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What a program takes on a target.

    Attributes:
      title: what was planned, in words.
      target: the target's name.
      chip: each of its devices.
      devices: their number.
      batch: samples per device.
      samples: samples of one run of the program, over all devices.
      kinds: bytes per device of the program's inputs, by kind.
      program: the compiled program.
      is_half: whether products are computed in half precision.
      steps: how often it is to run; ``None`` if that is not known.
      advice: what would help, in sentences.
    """

    title: str
    target: str
    chip: Chip
    devices: int
    batch: int
    samples: int
    kinds: Mapping[str, int]
    program: Program
    is_half: bool
    steps: int | None = None
    advice: Sequence[str] = ()

    @property
    def fits(self) -> bool:
        """Whether the devices have enough memory."""
        return self.program.needed <= self.chip.usable

    @property
    def seconds_by_cause(self) -> dict[str, float]:
        """The least time that each resource needs for one run; the largest is the roofline."""
        peak = self.chip.flops if self.is_half else self.chip.flops_float32
        found = self.program.census
        causes = {"compute": self.program.flops / self.devices / peak}
        if found is not None:
            causes["memory"] = found.bytes_moved / self.chip.bandwidth
            causes["network"] = sum(each.bytes for each in found.collectives.values()) / self.chip.network
        return causes

    @property
    def seconds(self) -> float:
        """The estimated time of one run."""
        return max(self.seconds_by_cause.values()) / EFFICIENCY

    @property
    def share_of_peak(self) -> float:
        """The share of the devices' peak at that time."""
        return self.seconds_by_cause["compute"] / self.seconds

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        hours = None if self.steps is None else self.steps * self.seconds / 3600
        return {
            "title": self.title,
            "target": self.target,
            "chip": dataclasses.asdict(self.chip),
            "devices": self.devices,
            "batch_per_device": self.batch,
            "samples_per_step": self.samples,
            "fits": self.fits,
            "bytes_per_device": {**self.kinds, "temporaries": self.program.temporary, "total": self.program.needed},
            "bytes_usable": self.chip.usable,
            "program": dataclasses.asdict(self.program),
            "estimate": {
                "efficiency": EFFICIENCY,
                "seconds_by_cause": self.seconds_by_cause,
                "seconds_per_step": self.seconds,
                "samples_per_second": self.samples / self.seconds,
                "share_of_peak": self.share_of_peak,
                "hours": hours,
                "chip_hours": None if hours is None else hours * self.devices,
            },
            "advice": list(self.advice),
        }


def describe(plan: Plan) -> str:
    """The plan as text for a terminal."""
    program, chip = plan.program, plan.chip
    rows = [(kind, _gib(size)) for kind, size in plan.kinds.items() if size]
    rows.append(("temporaries", _gib(program.temporary)))
    rows.append(("in all", f"{_gib(program.needed)} of {_gib(chip.usable)}: {_verdict(plan)}"))
    lines = [f"{plan.title}", f"on {plan.devices} × {chip.name}, {plan.batch} samples per device", ""]
    lines += ["memory per device, GiB", *_aligned(rows), ""]
    lines += ["time", *_aligned(_times(plan)), ""]
    if program.census is not None:
        lines += ["the compiled program", *_aligned(_contents(program)), ""]
    lines += [f"- {sentence}" for sentence in plan.advice]
    return "\n".join(lines).rstrip()


def table(plans: Sequence[Mapping[str, Any]]) -> str:
    """Plans, as `Plan.to_json` gives them, as a table in Markdown."""
    head = (
        "target",
        "devices",
        "batch per device",
        "GiB per device",
        "of",
        "fits",
        "samples per second",
        "of the peak",
    )
    rows = [
        (
            each["target"],
            f"{each['devices']} × {each['chip']['name']}",
            f"{each['batch_per_device']}",
            _gib(each["bytes_per_device"]["total"]),
            _gib(each["bytes_usable"]),
            "yes" if each["fits"] else "no",
            f"{each['estimate']['samples_per_second']:.3g}" if each["fits"] else "",
            f"{each['estimate']['share_of_peak']:.0%}" if each["fits"] else "",
        )
        for each in plans
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])


def _verdict(plan: Plan) -> str:
    if plan.fits:
        return f"fits ({plan.program.needed / plan.chip.usable:.0%})"
    return f"does NOT fit, by {_gib(plan.program.needed - plan.chip.usable)}"


def _times(plan: Plan) -> list[tuple[str, str]]:
    causes = plan.seconds_by_cause
    largest = max(causes, key=causes.__getitem__)
    rows = [
        ("operations per step", f"{_si(plan.program.flops)}FLOP, over all devices"),
        *((f"least time for {cause}", _duration(seconds)) for cause, seconds in causes.items()),
        ("step", f"about {_duration(plan.seconds)}, bound by {largest}, if it reaches {EFFICIENCY:.0%} of that"),
        ("samples per second", f"about {plan.samples / plan.seconds:.3g}, at {plan.share_of_peak:.0%} of the peak"),
    ]
    if plan.steps is not None:
        hours = plan.steps * plan.seconds / 3600
        rows.append((f"{plan.steps:,} steps", f"about {hours:.3g} hours, {hours * plan.devices:.3g} chip-hours"))
    until = "compiled" if plan.program.is_whole else "memory laid out"
    rows.append((until, f"in {plan.program.seconds:.0f} s, here"))
    return rows


def _contents(program: Program) -> list[tuple[str, str]]:
    found = program.census
    assert found is not None
    kernels = ", ".join(f"{count} × {name}" for name, count in sorted(found.kernels.items())) or "none of its own"
    rows = [
        ("moved to and from memory", f"{_si(found.bytes_moved)}B per device"),
        ("attention kernels", kernels),
        ("convolutions", f"{found.convolutions}, {found.convolutions_not_nhwc} of them not NHWC"),
        ("copies and transposes", f"{found.moves}, {_si(found.bytes_of_moves)}B"),
        ("conversions", f"{found.converts}, {_si(found.bytes_of_converts)}B"),
    ]
    rows += [(name, f"{each.count}, {_si(each.bytes)}B sent") for name, each in sorted(found.collectives.items())]
    return rows


def _aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {value}" for name, value in rows]


def _gib(size: float | int) -> str:
    return f"{size / GIB:.2f}"


def _si(number: float | int) -> str:
    for prefix, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.3g} "


def _duration(seconds: float | int) -> str:
    if seconds >= 120:
        return f"{seconds / 60:.3g} min"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
