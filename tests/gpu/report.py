"""The results of the stages as one table of twenty rows, and behind it everything else that was measured: OUT's
<device>-<commit>.md, and what run.py prints at its end.

A row that was not measured says so; a target that was missed stays, with what was reached.
"""
import pathlib
import re

import details

LAYERS = 32  # of the 8B


def commit():
    """Of the bundle this is part of."""
    file = pathlib.Path(__file__).resolve().parent / "commit"
    return file.read_text().strip() if file.exists() else "unknown"


class Results:
    """All records of all stages."""

    def __init__(self, stages):
        self.stages = stages

    def all(self, kind, **fields):
        """The records of a kind with these fields."""
        return [record for stage in self.stages.values() for record in stage["records"]
                if record.get("kind") == kind and all(record.get(k) == v for k, v in fields.items())]

    def find(self, kind, **fields):
        """The first of them; None when there is none."""
        return next(iter(self.all(kind, **fields)), None)

    def best(self, kind, key, **fields):
        """The largest value of a key among them; None when there is none."""
        return max((record[key] for record in self.all(kind, **fields)), default=None)

    def ceiling(self, name):
        """GB/s or TFLOP/s of the device; None when it was not measured."""
        record = self.find("ceiling", name=name) or {}
        return record.get("gb_per_s") or record.get("tflops") or None

    def why_not(self, *stages):
        """Why a row of these stages has no result, where that is known."""
        for name in stages:
            error = self.stages.get(name, {}).get("error")
            if error:
                return f"{name} failed: {error}"
        return ""


def number(value, unit):
    if value is None:
        return "not measured"
    return f"{value:,.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"


def joined(*parts):
    return "; ".join(part for part in parts if part)


def step_record(results, **shape):
    return results.find("step", **{"launch": "plain", "weights": "bf16", "kv": "bf16", **shape})


def rate_of(record):
    return None if record is None else record["batch"] / record["ms"] * 1e3


def kernel_sum_ms(results, batch, context):
    """The kernels of a bf16 decode step, each by itself, without embedding and sampler; None unless all are there."""
    total = 0.0
    for name, count in (("norm", 2 * LAYERS + 1), ("qkv bf16", LAYERS), ("rope", LAYERS), ("o bf16", LAYERS), ("fc1 bf16", LAYERS),
                        ("squared relu", LAYERS), ("fc2 bf16", LAYERS), ("head bf16", 1)):
        record = results.find("kernel", name=name, rows=batch)
        if record is None:
            return None
        total += count * record["us"] / 1e3
    attention = results.find("kernel", name="decode attention bf16", rows=batch, context=context)
    return None if attention is None else total + LAYERS * attention["us"] / 1e3


def decode_row(results, batch, context, target):
    """Bf16 decode steps against the read floor and the sum of their kernels."""
    record = step_record(results, batch=batch, context=context)
    early = step_record(results, batch=batch, context=context, launch="early")
    read = results.ceiling("read")
    floor = gap = start = ""
    if record is not None and read is not None:
        floor = f"{details.floor_ms(record, read) / record['ms']:.0%} of the read floor"
    kernels_ms = kernel_sum_ms(results, batch, context)
    if record is not None and kernels_ms is not None:
        gap = f"{record['ms']:.3f} ms, of which its kernels by themselves {kernels_ms:.3f}"
    if record is not None and early is not None:
        start = f"started early {record['ms'] / early['ms'] - 1.0:+.1%}"
    free = step_record(results, batch=batch, context=context, launch="free")
    if record is not None and free is not None:
        start = joined(start, f"batch invariance costs {record['ms'] / free['ms'] - 1.0:+.1%}")
    return (f"decode, batch {batch}, context {context}, bf16", number(rate_of(record), "tok/s"), target,
            joined(floor, gap, start) or results.why_not("steps"))


def prefill_row(results):
    prompt, free = [results.find("prefill", weights="bf16", kv="bf16", launch=launch, prompt=2048)
                    for launch in ("plain", "free")]
    cost = "" if prompt is None or free is None else (
        f"batch invariance costs {free['tokens_per_s'] / prompt['tokens_per_s'] - 1.0:+.1%}")
    return ("prefill, prompts of 2048", number(prompt and prompt["tokens_per_s"], "tok/s"), ">= 42,000",
            cost or results.why_not("steps"))


def fp8_row(results):
    record = step_record(results, batch=64, context=512, weights="fp8", kv="fp8")
    plain = step_record(results, batch=64, context=512)
    dynamic = step_record(results, batch=64, context=512, weights="fp8-dynamic", kv="fp8")
    ratio = "" if record is None or plain is None else f"{plain['ms'] / record['ms']:.2f} times bf16"
    other = "" if dynamic is None else f"fp8-dynamic {number(rate_of(dynamic), 'tok/s')}"
    return ("decode, batch 64, context 512, weights and KV fp8", number(rate_of(record), "tok/s"), "about twice bf16",
            joined(ratio, other) or results.why_not("steps-fp8"))


def steady_row(results, prompt, output, target):
    """Output tokens per second with 256 clients, and the same with weights and KV in fp8."""
    shape = {"mode": "steady", "prompt": prompt, "output": output}
    record, fp8 = [results.find("load", weights=weights, **shape) for weights in ("bf16", "fp8")]
    text = "" if record is None else f"ITL p50 {record['itl_p50_ms']:.1f}, p99 {record['itl_p99_ms']:.1f} ms"
    quantized = "fp8 not measured, to be about twice that" if fp8 is None else (
        f"fp8 {number(fp8['tokens_per_s'], 'out tok/s')}, to be about {2 * target:,}")
    return (f"gRPC, 256 clients, {prompt}/{output}", number(record and record["tokens_per_s"], "out tok/s"),
            f">= {target:,}", joined(text, quantized, results.why_not("load")))


def kernel_row(results, name, peers=(), **shape):
    record = results.find("kernel", name=name, **shape)
    read = results.ceiling("read")
    what = ", ".join(f"{key} {value}" for key, value in shape.items())
    if record is None:
        return f"{name}, {what}", "not measured", "", results.why_not("roofline")
    parts = []
    if read is not None:
        parts.append(f"{record['bytes'] / record['us'] / 1e3 / read:.0%} of the read ceiling")
    for other, text in ((f"{name}, free choice", "batch invariance costs"),
                        (f"{name}, first choice", "against the library's first choice")):
        found = results.find("kernel", name=other, **shape)
        if found is not None:
            parts.append(f"{text} {record['us'] / found['us'] - 1.0:+.0%}")
    fp8 = results.find("kernel", name=name.replace("bf16", "fp8"), **shape) if "attention" in name else None
    if fp8 is not None:
        parts.append(f"KV in fp8 {fp8['us']:.1f} us")
    for peer in peers:
        found = results.find("peer_kernel", name=peer, **shape)
        if found is not None:
            parts.append(f"{peer} {found['us']:.1f} us")
    return f"{name}, {what}", f"{record['us']:.1f} us", "", "; ".join(parts)


def peer_row(results, names, batch, context):
    """Ours against the fastest of some peers at one shape."""
    ours = rate_of(step_record(results, batch=batch, context=context))
    what = f"peer: {names[0]}, batch {batch}, context {context}"
    found = [(results.best("peer", "tokens_per_s", name=name, batch=batch, context=context), name) for name in names]
    found = [(rate, name) for rate, name in found if rate is not None]
    if not found:
        missing = results.find("skipped", name=names[0])
        return what, "skipped" if missing else "not measured", "slower than ours", missing["why"] if missing else ""
    rate, fastest = max(found)
    ratio = "" if ours is None else f"ours is {ours / rate:.2f} times as fast"
    return what, number(rate, "tok/s"), "slower than ours", joined(ratio, "" if fastest == names[0] else f"as {fastest}")


def batching_row(results):
    """transformers' 64 requests of 512/128 against our server's at the same load."""
    name = "transformers, continuous batching"
    record, missing = results.find("peer", name=name), results.find("skipped", name=name)
    ours = results.find("load", mode="closed", clients=64, prompt=512, output=128, weights="bf16")
    text = "" if record is None or ours is None else (
        f"ours over gRPC {number(ours['tokens_per_s'], 'out tok/s')}, {ours['tokens_per_s'] / record['tokens_per_s']:.2f} "
        "times as fast")
    if record is None and missing is not None:
        return f"peer: {name}, 64 x 512/128", "skipped", "slower than ours", missing["why"]
    return (f"peer: {name}, 64 x 512/128", number(record and record["tokens_per_s"], "out tok/s"), "slower than ours",
            text)


def tests_row(results):
    parts = []
    for name in ("kernels", "runner"):
        record = results.find("test", name=name)
        parts.append(f"{name} not run" if record is None else f"{name} {record['passed']} passed"
                     + (f", {len(record['failed'])} FAILED" if record["failed"] else ""))
    for tool in ("memcheck", "racecheck"):
        parts.append(f"{tool} {'clean' if results.find('sanitizer', tool=tool) else 'not run'}")
    measured = any("not run" not in part for part in parts)
    return ("tests on the device", ", ".join(parts) if measured else "not measured", "all",
            results.why_not("kernels", "model", "sanitizer"))


def gap_row(results):
    record = results.find("gap", batch=64, launch="plain")
    others = [f"batch {r['batch']}: {r['idle_p99_us']:.1f}" for r in results.all("gap", launch="plain")
              if r["batch"] != 64]
    text = "" if record is None else joined(f"p50 {record['idle_p50_us']:.1f} us, of {record['steps']} steps", *others)
    return ("idle between decode graphs, p99, batch 64", number(record and record["idle_p99_us"], "us"), "<= 50 us",
            text or results.why_not("steps"))


def layers_row(results):
    layers, missing = results.find("layers"), results.find("skipped", name="layers")
    bits = results.all("bits")
    same = "" if not bits else f"the same bits in {sum(r['same'] for r in bits)} of {len(bits)} ways to batch"
    value, against = "not measured", ""
    if layers is not None:
        value = f"{layers['mean_nats']:.4f} nat mean, {layers['p99_nats']:.4f} p99, regret {layers['regret_nats']:.4f}"
        other = layers["other_in_bf16"]
        against = (f"{layers['against']}, which in bf16 is {other['mean_nats']:.4f} and {other['p99_nats']:.4f} from "
                   "itself")
    return ("4 layers against another implementation", value, "<= 0.03, 0.12, 0.2",
            joined(against or (missing["why"] if missing else ""), same, results.why_not("layers")))


def rows(results):
    """The twenty rows: what, result, target, remark."""
    table = []
    for name, unit, key in (("copy", "GB/s", "gb_per_s"), ("read", "GB/s", "gb_per_s"),
                            ("bf16 GEMM", "TFLOP/s", "tflops")):
        record = results.find("ceiling", name=name)
        table.append((f"ceiling: {name}", number(record and record[key], unit), "", results.why_not("ceilings")))
    table += [tests_row(results), layers_row(results),
              kernel_row(results, "decode attention bf16", ("flashinfer, paged decode", "torch, sdpa"), rows=64,
                         context=2048),
              kernel_row(results, "fc1 bf16", ("torch, matmul fc1",), rows=64),
              kernel_row(results, "head bf16", rows=64),
              decode_row(results, 1, 512, ">= 250"), decode_row(results, 64, 512, ">= 11,700"), fp8_row(results)]
    table.append(prefill_row(results))
    table += [gap_row(results), steady_row(results, 128, 2048, 12800), steady_row(results, 1000, 1000, 8800),
              steady_row(results, 2048, 2048, 5400)]
    ready, first = [results.find("ready", shape="8b", start=start) for start in ("second", "first")]
    table.append(("ready, 8B in the page cache", number(ready and ready["seconds"], "s"), "<= 10",
                  "" if first is None else f"the first start, which times the products, {first['seconds']:.1f} s"))
    table += [peer_row(results, ("torch, recorded steps", "torch, compiled steps"), 64, 512), batching_row(results),
              peer_row(results, ("llama.cpp",), 1, 512)]
    return table


def markdown(table, head=("what", "result", "target", "remark")):
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in table])


def write(folder, stages):
    """Writes the Markdown file; returns the table. `stages`: as in results.json."""
    results = Results(stages)
    table = markdown(rows(results))
    found = results.find("device")
    title = "no device" if found is None else f"{found['name']}, driver {found.get('driver_version', 'unknown')}"
    name = re.sub(r"[^A-Za-z0-9]+", "-", title.split(",")[0]).strip("-").lower()
    sections = "".join(f"\n## {head}\n\n{text}\n" for head, text in details.sections(results, markdown))
    (pathlib.Path(folder) / f"{name}-{commit()}.md").write_text(f"# {title}, commit {commit()}\n\n{table}\n{sections}")
    return table
