"""Everything that was measured, in tables behind the one of twenty rows."""


# Bits of a layer's and of the head's parameters, by format; bytes of a token's KV cache.
BITS = {"bf16": (16, 16), "fp8": (8.03, 8.03), "fp8-dynamic": (8.03, 8.03), "int8": (8.25, 8.25), "int4": (4.5, 8.25)}
KV_BYTES = {"bf16": 131072, "fp8": 66048}
LAYER_PARAMETERS, HEAD_PARAMETERS = 6.174e9, 1.049e9


def floor_ms(step, read):
    """How long it takes only to read what a decode step of the 8B needs, at the device's read bandwidth in GB/s."""
    layers, head = BITS[step["weights"]]
    weights = (LAYER_PARAMETERS * layers + HEAD_PARAMETERS * head) / 8
    return (weights + step["batch"] * step["context"] * KV_BYTES[step["kv"]]) / read / 1e6


def steps(results):
    read = results.ceiling("read")
    is_8b = any(r["weight_bytes"] > 3e9 for r in results.all("load_model"))
    return [[r["weights"], r["kv"], r["launch"], str(r["batch"]), str(r["context"]), f"{r['ms']:.3f}",
             f"{r['batch'] / r['ms'] * 1e3:,.0f}", f"{floor_ms(r, read) / r['ms']:.0%}" if read and is_8b else ""]
            for r in results.all("step")]


def bits(results):
    return [[r["what"], "same" if r["same"] else "DIFFERENT", f"{r['largest_nats']:.6f}"] for r in results.all("bits")]


def gaps(results):
    return [[r["launch"], str(r["batch"]), str(r["context"]), str(r["steps"]),
             *[f"{r[key]:.1f}" for key in ("idle_p50_us", "idle_p99_us", "wait_p99_us", "forward_us", "sampling_us")]]
            for r in results.all("gap")]


def prompts(results):
    return [[r["weights"], r["kv"], r["launch"], str(r["prompt"]), f"{r['tokens_per_s']:,.0f}"]
            for r in results.all("prefill")]


def loads(results):
    return [[r["weights"], r["mode"], f"{r.get('clients', r.get('rate')):g}", f"{r['prompt']}/{r['output']}",
             f"{r['requests']}", f"{r['failed']}", f"{r['tokens_per_s']:,.0f}",
             *[f"{r[key]:.1f}" for key in ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")]]
            for r in results.all("load")]


def kernels(results):
    read, product = results.ceiling("read"), results.ceiling("bf16 GEMM")
    table = []
    for r in results.all("kernel"):
        us = max(r["us"], 1e-9)
        moved, computed = r["bytes"] / us / 1e3, r["flop"] / us / 1e6
        table.append([r["name"], str(r["rows"]), str(r.get("context", "")), f"{r['us']:.1f}", f"{moved:,.0f}",
                      f"{moved / read:.0%}" if read else "", f"{computed:,.1f}",
                      f"{computed / product:.0%}" if product else ""])
    return table


def others(results):
    return [[r["name"], str(r.get("batch", r.get("rows", ""))), str(r.get("context", "")),
             f"{r['tokens_per_s']:,.0f} tok/s" if "tokens_per_s" in r else f"{r['us']:.1f} us"]
            for r in results.all("peer") + results.all("peer_kernel")]


def starts(results):
    return [[r["shape"], r.get("start", ""), f"{r['seconds']:.2f}"] for r in results.all("ready")] + [
        [f"runner, weights {r['weights']}", r["launch"], f"{r['seconds']:.2f}"] for r in results.all("load_model")] + [
        [f"checkpoint {r['shape']}, made in {r['folder']}", "", f"{r['seconds']:.2f}"]
        for r in results.all("checkpoint")]


def busy(results):
    return [[r["what"], f"{r['busy_percent']:.0f} %", f"{r['sm_mhz']:.0f}", f"{r['watts']:.0f}", str(r["samples"])]
            for r in results.all("gpu")]


def profiles(results):
    return [[r["kernel"], str(r["rows"]), str(r["context"]), f"{r['share']:.0%}",
             "; ".join(f"{name} {value}" for name, value in r["metrics"].items())] for r in results.all("ncu")]


def stages(results):
    table = []
    for name, stage in results.stages.items():
        why = stage.get("error") or "; ".join(f"{r['name']}: {r['why']}" for r in stage["records"]
                                               if r["kind"] == "skipped")
        table.append([name, stage["state"], f"{stage['seconds']:.0f}", why.replace("\n", " ").replace("|", "/")])
    return table


TABLES = (
    ("Decode steps", steps, ("weights", "KV", "launch", "batch", "context", "ms", "tok/s", "of the read floor")),
    ("The same bits", bits, ("what", "bits", "largest difference, nats")),
    ("Idle between decode graphs, us", gaps, ("launch", "batch", "context", "steps", "idle p50", "idle p99",
                                              "host late p99", "recorded part", "head and sampling")),
    ("Prompts", prompts, ("weights", "KV", "launch", "prompt", "tok/s")),
    ("Load over gRPC", loads, ("weights", "mode", "clients or requests/s", "prompt/output", "requests", "failed",
                               "out tok/s", "TTFT p50 ms", "p99", "ITL p50 ms", "p99")),
    ("Device during load", busy, ("what", "busy", "SM MHz", "W", "samples")),
    ("Kernels", kernels, ("kernel", "rows", "context", "us", "GB/s", "of read", "TFLOP/s", "of GEMM")),
    ("Peers", others, ("peer", "batch", "context", "result")),
    ("Nsight Compute", profiles, ("kernel", "rows", "context", "of its ceiling", "metrics")),
    ("Starts, s", starts, ("what", "how", "seconds")),
    ("Stages", stages, ("stage", "end", "seconds", "why")),
)


def sections(results, markdown):
    """(heading, table) of everything there is a record of."""
    for heading, make, head in TABLES:
        table = make(results)
        if table:
            yield heading, markdown(table, head)
