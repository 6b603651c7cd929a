#!/usr/bin/env python3
"""Writes the Grafana dashboard (minitron.json) from the table below, so that its queries can be read and reviewed.

Usage: make_dashboard.py [--check]     --check: fails when the file is not what this program writes
"""
import json
import pathlib
import sys

SELECT = '{namespace=~"$namespace",pod=~"$pod",model_name=~"$model_name"}'


def rate(metric, by="", labels=""):
    selector = SELECT[:-1] + ("," + labels if labels else "") + "}"
    return f"sum by ({by}) (rate({metric}{selector}[$__rate_interval]))"


def quantile(q, metric):
    return f"histogram_quantile({q}, {rate(metric + '_bucket', 'le')})"


def quantiles(metric):
    return [(quantile(q, metric), f"p{round(q * 100)}") for q in (0.5, 0.95, 0.99)]


def gauge(metric, legend="{{pod}}"):
    return [(metric + SELECT, legend)]


def heatmap(metric):
    return [(f"sum by (le) (increase({metric}_bucket{SELECT}[$__rate_interval]))", "{{le}}")]


# Row -> panels: (title, type, unit, [(query, legend)]).
ROWS = {
    "Service level": [
        ("Ready", "stat", "short", [(f"sum(minitron_ready{SELECT})", "ready")]),
        ("Error ratio, 5 min", "stat", "percentunit", [('minitron:errors:ratio5m{model_name=~"$model_name"}', "")]),
        ("First token p99", "stat", "s", [('minitron:time_to_first_token_seconds:p99{model_name=~"$model_name"}', "")]),
        ("Between tokens p99", "stat", "s", [('minitron:inter_token_latency_seconds:p99{model_name=~"$model_name"}', "")]),
        ("Tokens/s", "stat", "short", [('minitron:generation_tokens:rate5m{model_name=~"$model_name"}', "")]),
        ("Refused, 5 min", "stat", "percentunit", [('minitron:admission_rejections:ratio5m{model_name=~"$model_name"}', "")]),
    ],
    "Traffic": [
        ("Calls by method", "timeseries", "reqps", [(rate("minitron_grpc_requests_total", "method"), "{{method}}")]),
        ("Calls by status", "timeseries", "reqps", [(rate("minitron_grpc_requests_total", "code"), "{{code}}")]),
        ("Requests by end", "timeseries", "reqps", [(rate("minitron_requests_finished_total", "finish_reason"), "{{finish_reason}}")]),
        ("Refusals by reason", "timeseries", "reqps", [(rate("minitron_admission_rejections_total", "reason"), "{{reason}}")]),
        ("Open calls", "timeseries", "short", gauge("minitron_grpc_streams_active")),
        ("Streams cut off, not read", "timeseries", "short", [(rate("minitron_stream_write_stalls_total", "pod"), "{{pod}}")]),
    ],
    "Latency": [
        ("Time to first token", "timeseries", "s", quantiles("minitron_time_to_first_token_seconds")),
        ("Between tokens", "timeseries", "s", quantiles("minitron_inter_token_latency_seconds")),
        ("In the queue", "timeseries", "s", quantiles("minitron_request_queue_time_seconds")),
        ("Whole request", "timeseries", "s", quantiles("minitron_e2e_request_latency_seconds")),
        ("Prefill", "timeseries", "s", quantiles("minitron_request_prefill_time_seconds")),
        ("Decode", "timeseries", "s", quantiles("minitron_request_decode_time_seconds")),
        ("Time to first token, spread", "heatmap", "s", heatmap("minitron_time_to_first_token_seconds")),
        ("Between tokens, spread", "heatmap", "s", heatmap("minitron_inter_token_latency_seconds")),
    ],
    "Scheduler": [
        ("Running", "timeseries", "short", gauge("minitron_requests_running")),
        ("Waiting", "timeseries", "short", gauge("minitron_requests_waiting")),
        ("Sequences per step", "timeseries", "short", quantiles("minitron_engine_step_batch_size")),
        ("Token rows per step", "timeseries", "short", quantiles("minitron_engine_step_tokens")),
        ("Preemptions", "timeseries", "short", [(rate("minitron_preemptions_total", "pod"), "{{pod}}")]),
    ],
    "KV and prefix cache": [
        ("KV cache in use", "timeseries", "percentunit", gauge("minitron_kv_cache_usage_ratio")),
        ("KV blocks in use", "timeseries", "short", gauge("minitron_kv_cache_blocks_used") + gauge("minitron_kv_cache_blocks", "{{pod}} total")),
        ("Prefix cache hits", "timeseries", "percentunit", [('minitron:prefix_cache_hits:ratio5m{model_name=~"$model_name"}', "{{model_name}}")]),
    ],
    "Tokens": [
        ("Prompt tokens/s", "timeseries", "short", [(rate("minitron_prompt_tokens_total", "pod"), "{{pod}}")]),
        ("Generated tokens/s", "timeseries", "short", [(rate("minitron_generation_tokens_total", "pod"), "{{pod}}")]),
        ("Per running sequence", "timeseries", "short", [('minitron:generation_tokens_per_running_sequence:rate5m{model_name=~"$model_name"}', "{{model_name}}")]),
        ("Prompt length", "timeseries", "short", quantiles("minitron_request_prompt_tokens")),
        ("Answer length", "timeseries", "short", quantiles("minitron_request_generation_tokens")),
    ],
    "Tenants": [
        ("Tokens/s by tenant", "timeseries", "short", [(rate("minitron_tenant_tokens_total", "tenant"), "{{tenant}}")]),
        ("Requests by tenant", "timeseries", "reqps", [(rate("minitron_tenant_requests_total", "tenant"), "{{tenant}}")]),
        ("Over their limits", "timeseries", "reqps", [(rate("minitron_tenant_refusals_total", "tenant"), "{{tenant}}")]),
    ],
    "Engine": [
        ("Step duration", "timeseries", "s", quantiles("minitron_engine_step_duration_seconds")),
        ("Steps/s by phase", "timeseries", "short", [(rate("minitron_engine_steps_total", "phase"), "{{phase}}")]),
        ("Heartbeat", "timeseries", "s", gauge("minitron_engine_heartbeat_age_seconds") + gauge("minitron_engine_heartbeat_limit_seconds", "{{pod}} limit")),
        ("Waiting for the output thread", "timeseries", "percentunit", [(rate("minitron_engine_outbox_wait_seconds_total", "pod"), "{{pod}}")]),
        ("Engine errors", "timeseries", "short", [(rate("minitron_engine_errors_total", "kind"), "{{kind}}")]),
    ],
    "GPU (DCGM exporter)": [
        ("Utilisation", "timeseries", "percent", [('DCGM_FI_DEV_GPU_UTIL{pod=~"$pod"}', "{{gpu}}")]),
        ("Memory in use", "timeseries", "decmbytes", [('DCGM_FI_DEV_FB_USED{pod=~"$pod"}', "{{gpu}}")]),
        ("Power", "timeseries", "watt", [('DCGM_FI_DEV_POWER_USAGE{pod=~"$pod"}', "{{gpu}}")]),
        ("Xid", "timeseries", "short", [('DCGM_FI_DEV_XID_ERRORS{pod=~"$pod"}', "{{gpu}}")]),
    ],
    "Process": [
        ("CPU", "timeseries", "short", [('rate(process_cpu_seconds_total{namespace=~"$namespace",pod=~"$pod"}[$__rate_interval])', "{{pod}}")]),
        ("Resident memory", "timeseries", "bytes", [('process_resident_memory_bytes{namespace=~"$namespace",pod=~"$pod"}', "{{pod}}")]),
        ("Memory against the limit", "timeseries", "percentunit", gauge("minitron_memory_usage_ratio")),
        ("Descriptors", "timeseries", "short", [('process_open_fds{namespace=~"$namespace",pod=~"$pod"}', "{{pod}}")]),
        ("Connections", "timeseries", "short", gauge("minitron_connections_open")),
        ("Connections refused", "timeseries", "short", [(rate("minitron_connections_refused_total", "reason"), "{{reason}}")]),
        ("Callers refused", "timeseries", "short", [(rate("minitron_auth_failures_total", "reason"), "{{reason}}")]),
        ("Reloads failing", "timeseries", "short", gauge("minitron_config_reload_failing", "{{pod}} {{what}}")),
    ],
}


def variable(name, query):
    return {"name": name, "label": name, "type": "query", "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "query": {"query": query, "refId": name}, "definition": query, "refresh": 2, "multi": True, "includeAll": True,
            "allValue": ".*", "current": {"text": "All", "value": "$__all"}}


def dashboard():
    source = {"type": "prometheus", "uid": "${datasource}"}
    panels, y = [], 0
    for row, entries in ROWS.items():
        panels.append({"id": len(panels) + 1, "type": "row", "title": row, "collapsed": False, "panels": [],
                       "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}})
        y += 1
        width = 4 if entries[0][1] == "stat" else 8
        height = 4 if entries[0][1] == "stat" else 7
        for i, (title, kind, unit, queries) in enumerate(entries):
            x = i * width % 24
            if i > 0 and x == 0:
                y += height
            targets = [{"refId": chr(65 + k), "expr": query, "legendFormat": legend, "datasource": source,
                        **({"format": "heatmap"} if kind == "heatmap" else {})} for k, (query, legend) in enumerate(queries)]
            panels.append({"id": len(panels) + 1, "type": kind, "title": title, "datasource": source, "targets": targets,
                           "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []}, "options": {},
                           "gridPos": {"x": x, "y": y, "w": width, "h": height}})
        y += height
    return {
        "uid": "minitron", "title": "minitron-server", "tags": ["minitron", "llm"], "schemaVersion": 38, "version": 1,
        "editable": True, "refresh": "10s", "time": {"from": "now-1h", "to": "now"}, "timezone": "",
        "templating": {"list": [
            {"name": "datasource", "label": "datasource", "type": "datasource", "query": "prometheus", "current": {}},
            variable("namespace", "label_values(minitron_ready, namespace)"),
            variable("pod", 'label_values(minitron_ready{namespace=~"$namespace"}, pod)'),
            variable("model_name", "label_values(minitron_ready, model_name)"),
        ]},
        "annotations": {"list": []}, "links": [], "panels": panels,
    }


def main():
    path = pathlib.Path(__file__).parent / "minitron.json"
    board = dashboard()
    # One panel a line: a changed query is one changed line.
    panels = ",\n ".join(json.dumps(panel) for panel in board.pop("panels"))
    text = json.dumps(board)[:-1] + ', "panels": [\n ' + panels + "\n]}\n"
    if sys.argv[1:] == ["--check"]:
        sys.exit(0 if path.read_text() == text else f"{path.name} is not what {pathlib.Path(__file__).name} writes")
    path.write_text(text)


if __name__ == "__main__":
    main()
