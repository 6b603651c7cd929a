"""What the programs of a comparison print, read; and the tables made from it. Nothing here runs anything."""
import dataclasses
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

MEASURES = ("decode, 1 sequence", "decode, 8 sequences", "prompt of 128")
FORMATS = {"bf16": "bf16", "int8": "Q8_0", "int4": "Q4_0"}  # ours to the peer's
# Ours to llama.cpp's tokens/s, per measure. A peer given by another name is to be reached, not to be left behind.
TARGETS = {"bf16": (1.3, 1.5, 1.25), "int8": (1.5, 1.8, 1.5), "int4": (1.7, 2.2, 2.2)}
OTHER_TARGET = 1.0


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the machine can do at the moment."""

    read: float  # GB/s
    fma: float  # GFLOP/s


@dataclasses.dataclass(frozen=True)
class Rates:
    """Tokens/s per measure, and for ours the share of the limit in percent that it makes."""

    tokens: tuple[float, ...]
    shares: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Pair:
    """One run of each side, next to each other, between probes of the limits."""

    format: str
    ours: Rates
    peer: Rates
    probes: tuple[Limits, ...]


class UnreadableOutputError(ValueError):
    """A program printed something else than it should."""


def parse_limits(output: str) -> Limits:
    """The limits that minitron-bench-engine measured before anything else."""
    found = re.search(r"^limits: read ([\d.]+) GB/s, fp32 FMA ([\d.]+) GFLOP/s", output, re.MULTILINE)
    if not found:
        raise UnreadableOutputError(f"no limits in: {output[-400:]}")
    return Limits(float(found[1]), float(found[2]))


def parse_engine(output: str) -> Rates:
    """Decode of 1 and 8 sequences and the prompt, of minitron-bench-engine --batches 1,8 --prefill 128."""
    found = [engine_rate(output, row) for row in ("decode batch +1", "decode batch +8", "prefill +128")]
    return Rates(tuple(rate for rate, _ in found), tuple(share for _, share in found))


def engine_rate(output: str, row: str) -> tuple[float, float]:
    """Tokens/s and the share of its limit in percent, of one line of minitron-bench-engine."""
    found = re.search(row + r" +([\d.]+) tok/s +(\d+) % of", output)
    if not found:
        raise UnreadableOutputError(f"no {row!r} in: {output[-400:]}")
    return float(found[1]), float(found[2])


def parse_batched_bench(output: str) -> Rates:
    """The same of llama-batched-bench -npp 128 -npl 1,..,8,.. -pps: medians over the rows of its table."""
    prompt: list[float] = []
    decode: dict[int, list[float]] = {1: [], 8: []}
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) != 10 or not cells[0].isdigit():
            continue
        if int(cells[0]) != 128 or int(cells[2]) not in decode:
            raise UnreadableOutputError(f"not the run that was asked for: {line}")
        prompt.append(float(cells[5]))
        decode[int(cells[2])].append(float(cells[7]))
    if not prompt or not all(decode.values()):
        raise UnreadableOutputError(f"rows are missing in: {output[-400:]}")
    return Rates((statistics.median(decode[1]), statistics.median(decode[8]), statistics.median(prompt)))


def flipped(pair: Pair, factor: float) -> bool:
    """Whether the machine changed under the pair: a limit differs by more than `factor` between its probes."""
    reads, fmas = [p.read for p in pair.probes], [p.fma for p in pair.probes]
    return max(reads) > factor * min(reads) or max(fmas) > factor * min(fmas)


def targets_of(peer: str, weight_format: str) -> tuple[float, ...]:
    """The ratios to reach, in the order of MEASURES."""
    return TARGETS[weight_format] if peer == "llama.cpp" else (OTHER_TARGET,) * len(MEASURES)


def span(values: Sequence[float], digits: int) -> str:
    """Lowest to highest."""
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def said(met: bool) -> str:
    return "yes" if met else "no"


def tokens(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def table(pairs: Iterable[Pair], peer: str, factor: float) -> str:
    """The comparison in Markdown: medians over the pairs that count, and what was probed and dropped, in words."""
    everything = list(pairs)
    counted = [pair for pair in everything if not flipped(pair, factor)]
    lines = [
        f"| | ours, tok/s | {peer}, tok/s | ratio | of single pairs | target | met | ours, of the limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for ours_name, peer_name in FORMATS.items():
        of_format = [pair for pair in counted if pair.format == ours_name]
        dropped = sum(pair.format == ours_name for pair in everything) - len(of_format)
        if dropped or of_format:
            notes.append(f"{ours_name} {len(of_format)} pairs" + (f" ({dropped} more dropped)" if dropped else ""))
        if not of_format:
            continue
        for i, measure in enumerate(MEASURES):
            ratios = [pair.ours.tokens[i] / pair.peer.tokens[i] for pair in of_format]
            target, ratio = targets_of(peer, ours_name)[i], statistics.median(ratios)
            names = ours_name if ours_name == peer_name else f"{ours_name} / {peer_name}"
            ours, theirs, share = (
                statistics.median(values)
                for values in zip(*((p.ours.tokens[i], p.peer.tokens[i], p.ours.shares[i]) for p in of_format))
            )
            limit = "FMA" if measure.startswith("prompt") else "read"
            lines.append(
                f"| {names}, {measure} | {tokens(ours)} | {tokens(theirs)} | {ratio:.2f} | {span(ratios, 2)} "
                f"| {target:g} | {said(ratio >= target)} | {share:.0f} % of {limit} |"
            )
    probes = [probe for pair in counted for probe in pair.probes]
    if probes:
        notes.append(
            f"limits probed around the runs: read {span([p.read for p in probes], 1)} GB/s, "
            f"FMA {span([p.fma for p in probes], 0)} GFLOP/s"
        )
    notes.append(f"a pair is dropped when a limit changed by more than {factor:g} between its probes")
    return "\n".join(lines) + "\n\n" + "; ".join(notes) + "."


def to_json(pair: Pair) -> str:
    return json.dumps(dataclasses.asdict(pair))


def from_json(line: str) -> Pair:
    """The pair that to_json wrote."""
    data: dict[str, Any] = json.loads(line)

    def rates(value: dict[str, Any]) -> Rates:
        return Rates(tuple(value["tokens"]), tuple(value["shares"]))

    probes = tuple(Limits(**probe) for probe in data["probes"])
    return Pair(data["format"], rates(data["ours"]), rates(data["peer"]), probes)


@dataclasses.dataclass(frozen=True)
class Served:
    """One run of the clients against one server."""

    tokens_per_s: float
    first_token_s: float  # median over the clients
    p99_gap_s: float  # between messages with tokens
    worst_gap_s: float


def parse_served(line: str) -> Served:
    """A line of minitron-bench --result FILE --detailed; every client must have been served in full."""
    run: dict[str, Any] = json.loads(line)
    if run["completed"] != run["num_prompts"]:
        raise UnreadableOutputError(f"{run['completed']} of {run['num_prompts']} requests completed")
    gaps = [gap for stream in run["itls"] for gap in stream]
    return Served(run["output_throughput"], run["median_ttft_ms"] / 1e3, run["p99_itl_ms"] / 1e3, max(gaps))


def served_table(ours: Sequence[Served], peer: Sequence[Served], peer_name: str, chunk_s: float) -> str:
    """Medians of the runs; `chunk_s`: what a chunk of a prompt takes ours, which no gap may be longer than."""

    def median(runs: Sequence[Served], field: str) -> float:
        return statistics.median(getattr(run, field) for run in runs)

    lines = [f"| | ours, int8 | {peer_name}, Q8_0 | target | met |", "|---|---|---|---|---|"]

    def row(name: str, field: str, target: str, met: str) -> None:
        form = ".1f" if field == "tokens_per_s" else ".2f"
        lines.append(f"| {name} | {median(ours, field):{form}} | {median(peer, field):{form}} | {target} | {met} |")

    ratio = median(ours, "tokens_per_s") / median(peer, "tokens_per_s")
    worst = max(run.worst_gap_s for run in ours)
    row("tokens/s", "tokens_per_s", f"2 x, is {ratio:.2f} x", said(ratio >= 2))
    row("first token, median, s", "first_token_s", "6", said(median(ours, "first_token_s") <= 6))
    row("gap between tokens, p99, s", "p99_gap_s", "-", "-")
    row("longest gap, s", "worst_gap_s", f"one chunk, {chunk_s:.2f}", said(worst <= chunk_s))
    note = f"Medians of {len(ours)} runs each, in turn; longest gap of all runs: ours {worst:.3f} s, {peer_name} "
    return "\n".join(lines) + f"\n\n{note}{max(run.worst_gap_s for run in peer):.3f} s."
