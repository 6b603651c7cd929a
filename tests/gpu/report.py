"""The results of the stages as one table: OUT/results.json, OUT/<device>-<commit>.md and what run.py prints at its end.

A row that was not measured says so; a target that was missed stays, with what was reached.
"""
import json
import pathlib
import re

# Bytes of weights a decode step of the 8B reads in bf16, and of KV cache per token in bf16.
WEIGHT_BYTES = 14.45e9
KV_BYTES = 131072


class Results:
    """All records of all stages."""

    def __init__(self, folder):
        self.stages = {}
        for path in sorted(pathlib.Path(folder).glob("*.json")):
            if path.name in ("results.json", "scores.json"):
                continue
            stage = json.loads(path.read_text())
            self.stages[stage["stage"]] = stage["records"]

    def find(self, kind, **fields):
        """The first record of a kind with these fields; None when there is none."""
        for records in self.stages.values():
            for record in records:
                if record.get("kind") == kind and all(record.get(k) == v for k, v in fields.items()):
                    return record
        return None

    def best(self, kind, key, **fields):
        """The largest value of a key among the records of a kind with these fields; None when there is none."""
        values = [record[key] for records in self.stages.values() for record in records
                  if record.get("kind") == kind and all(record.get(k) == v for k, v in fields.items())]
        return max(values, default=None)


def number(value, unit):
    if value is None:
        return "not measured"
    return f"{value:,.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"


def steps_row(results, batch, context, weights, kv, target):
    shape = {"batch": batch, "context": context, "weights": weights, "kv": kv}
    record = results.find("step", launch="plain", **shape)
    rate = None if record is None else batch / record["ms"] * 1e3
    name = f"decode, batch {batch}, context {context}, weights {weights}, KV {kv}"
    bandwidth = results.find("ceiling", name="read")
    share = ""
    if record is not None and bandwidth is not None and weights == "bf16" and kv == "bf16":
        floor_s = (WEIGHT_BYTES + batch * context * KV_BYTES) / (bandwidth["gb_per_s"] * 1e9)
        share = f"{floor_s / (record['ms'] / 1e3):.0%} of the read floor"
    early = results.find("step", launch="early", **shape)
    if record is not None and early is not None:
        share += f"; started early {record['ms'] / early['ms'] - 1.0:+.1%}"
    dynamic = results.find("step", launch="plain", **{**shape, "weights": "fp8-dynamic"})
    if weights == "fp8" and dynamic is not None:
        share += f"{'; ' if share else ''}fp8-dynamic {number(batch / dynamic['ms'] * 1e3, 'tok/s')}"
    return name, number(rate, "tok/s"), target, share


def load_row(results, clients, prompt, output, target):
    record = results.find("load", clients=clients, prompt=prompt, output=output)
    text = "" if record is None else f"TTFT p50 {record['ttft_p50_ms']:.0f} ms, ITL p99 {record['itl_p99_ms']:.1f} ms"
    rate = number(record and record["tokens_per_s"], "out tok/s")
    return f"gRPC, {clients} clients, {prompt}/{output}", rate, target, text


def kernel_row(results, name, **shape):
    record = results.find("kernel", name=name, **shape)
    ceiling = results.find("ceiling", name="read")
    what = ", ".join(f"{key} {value}" for key, value in shape.items())
    if record is None:
        return f"{name}, {what}", "not measured", "", ""
    rate = record["bytes"] / record["us"] / 1e3
    share = "" if ceiling is None else f"{rate / ceiling['gb_per_s']:.0%} of the read ceiling"
    free = results.find("kernel", name=name + ", free choice", **shape)
    if free is not None:
        share += f"; batch invariance costs {record['us'] / free['us'] - 1.0:+.0%}"
    return f"{name}, {what}", f"{record['us']:.1f} us", "", share


def peer_row(results, name, batch, context):
    """Ours against the fastest peer of the same shape."""
    ours = results.find("step", batch=batch, context=context, weights="bf16", kv="bf16", launch="plain")
    missing = results.find("skipped", name=name)
    if missing is not None:
        return f"peer: {name}, batch {batch}, context {context}", "skipped", "slower than ours", missing["why"]
    peers = results.best("peer", "tokens_per_s", name=name, batch=batch, context=context)
    ratio = "" if ours is None or peers is None else f"ours is {batch / ours['ms'] * 1e3 / peers:.2f} times as fast"
    return f"peer: {name}, batch {batch}, context {context}", number(peers, "tok/s"), "slower than ours", ratio


def rows(results):
    """The twenty rows: what, result, target, remark."""
    layers = results.find("layers")
    no_layers = results.find("skipped", name="layers")
    ready = results.find("ready", shape="8b")
    prompt = results.find("prefill", weights="bf16", kv="bf16", launch="plain")
    table = []
    for name, unit, key in (("copy", "GB/s", "gb_per_s"), ("read", "GB/s", "gb_per_s"),
                            ("bf16 GEMM", "TFLOP/s", "tflops")):
        record = results.find("ceiling", name=name)
        table.append((f"ceiling: {name}", number(record and record[key], unit), "", ""))
    table.append(kernel_row(results, "decode attention bf16", rows=64, context=2048))
    table.append(kernel_row(results, "decode attention fp8", rows=64, context=2048))
    table.append(kernel_row(results, "fc1 bf16", rows=64))
    table.append(kernel_row(results, "fc1 int4", rows=1))
    table.append(kernel_row(results, "head bf16", rows=64))
    table.append(steps_row(results, 1, 512, "bf16", "bf16", ">= 250"))
    table.append(steps_row(results, 64, 512, "bf16", "bf16", ">= 11,700"))
    table.append(steps_row(results, 64, 512, "fp8", "fp8", "about twice bf16"))
    table.append(("prefill, 2048 tokens", number(prompt and prompt["tokens_per_s"], "tok/s"), ">= 42,000", ""))
    table.append(load_row(results, 1, 512, 128, ""))
    table.append(load_row(results, 64, 512, 128, ""))
    table.append(load_row(results, 256, 512, 128, ""))
    table.append(("ready, 8B in the page cache", number(ready and ready["seconds"], "s"), "<= 10", ""))
    table.append(("4 layers against another implementation", "not measured" if layers is None else
                  f"{layers['mean_nats']:.4f} nat mean, {layers['p99_nats']:.4f} p99", "<= 0.03, 0.12",
                  layers["against"] if layers else no_layers["why"] if no_layers else ""))
    table.append(peer_row(results, "torch, recorded steps", 64, 512))
    table.append(peer_row(results, "transformers, continuous batching", 64, 512))
    table.append(peer_row(results, "llama.cpp", 1, 512))
    return table


def markdown(table):
    lines = ["| what | result | target | remark |", "|---|---|---|---|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in table])


def write(folder):
    """Writes results.json and the Markdown file; returns the table."""
    folder = pathlib.Path(folder)
    results = Results(folder)
    table = markdown(rows(results))
    (folder / "results.json").write_text(json.dumps(results.stages, indent=1))
    name = results.find("device")
    commit_file = pathlib.Path(__file__).resolve().parent / "commit"
    commit = commit_file.read_text().strip() if commit_file.exists() else "unknown"
    title = "no device" if name is None else f"{name['name']}, driver {name['driver']}"
    file_name = re.sub(r"[^A-Za-z0-9]+", "-", title.split(",")[0]).strip("-").lower() + f"-{commit}.md"
    (folder / file_name).write_text(f"# {title}, commit {commit}\n\n{table}\n")
    return table
