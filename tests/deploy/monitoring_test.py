#!/usr/bin/env python3
"""The shipped rules and the dashboard against what the real server exports, and a real Prometheus that fires."""
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.parse
import urllib.request

import grpc

sys.path.insert(0, os.path.dirname(__file__))
from harness import ROOT, FrozenThread, Server, busiest_thread, ends_complete, generate_request, health, stream, wait_for

RULES = ROOT / "deploy/prometheus/rules.yml"
DASHBOARD = ROOT / "deploy/grafana/minitron.json"
METRIC = re.compile(r"\b((?:minitron|process|vllm|up|DCGM)[a-zA-Z0-9_]*(?::[a-z0-9_:]+)?)\b")
EXTERNAL = {"up"}  # Prometheus' own


def tool(name):
    local = ROOT / "build/tools" / name
    return str(local) if local.exists() else name


def run(*command):
    result = subprocess.run(command, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def exported(text):
    """Names of series in the text format, histograms as _bucket, _sum and _count."""
    return {line.partition("{")[0].partition(" ")[0] for line in text.splitlines() if line and line[0] != "#"}


def expressions():
    return re.findall(r"^\s+expr: (.*(?:\n\s{10,}.*)*)", RULES.read_text(), re.M)


def strip_labels(expression):
    return re.sub(r'"[^"]*"', '""', re.sub(r"\{[^}]*\}", "", expression))


class ShippedFilesTest(unittest.TestCase):
    def setUp(self):
        self.recorded = set(re.findall(r"- record: (\S+)", RULES.read_text()))

    def test_promtool_accepts_the_rules_and_their_tests(self):
        for command in (("check", "rules", str(RULES)), ("test", "rules", str(RULES.parent / "rules_test.yml"))):
            code, output = run(tool("promtool"), *command)
            self.assertEqual(code, 0, output)

    def test_every_alert_has_a_test_that_fires_and_one_that_is_quiet_and_a_line_in_the_guide(self):
        alerts = re.findall(r"- alert: (\S+)", RULES.read_text())
        tests = (RULES.parent / "rules_test.yml").read_text()
        guide = (ROOT / "deploy/README.md").read_text()
        self.assertGreater(len(alerts), 20)
        for alert in alerts:
            self.assertIn(f"name: {alert} fires", tests)
            self.assertIn(f"name: {alert} is quiet", tests)
            self.assertIn(f"| {alert} |", guide)

    def test_every_metric_of_rules_and_dashboard_exists(self):
        with Server("--metrics-compat=vllm") as server:
            known = exported(server.metrics()) | self.recorded | EXTERNAL
        queries = [("rules", e) for e in expressions()]
        board = json.loads(DASHBOARD.read_text())
        for panel in board["panels"]:
            queries += [(panel["title"], target["expr"]) for target in panel.get("targets", [])]
        queries += [(v["name"], v["definition"]) for v in board["templating"]["list"] if v["type"] == "query"]
        checked = 0
        for where, query in queries:
            for name in METRIC.findall(strip_labels(query)):
                if name.startswith("DCGM_FI_DEV_") or name in ("process", "up"):
                    continue
                self.assertIn(name, known, f"{where}: {query}")
                checked += 1
        self.assertGreater(checked, 80)

    def test_labels_that_queries_select_exist(self):
        with Server() as server:
            text = server.metrics()
        for query in expressions():
            for metric, labels in re.findall(r"(minitron_\w+)\{([^}]*)\}", query):
                for label, _, values in re.findall(r'(\w+)(=~|=)"([^"]*)"', labels):
                    for value in values.split("|"):
                        pattern = rf'^{metric}\{{[^}}]*\b{label}="{re.escape(value)}"'
                        self.assertRegex(text, re.compile(pattern, re.M), query)

    def test_the_dashboard_is_what_its_table_says(self):
        code, output = run(sys.executable, str(DASHBOARD.parent / "make_dashboard.py"), "--check")
        self.assertEqual(code, 0, output)


class Prometheus:
    """The real one, with the shipped rules at a hundredth of their times."""

    def __init__(self, server):
        self.folder = tempfile.TemporaryDirectory(prefix="minitron_prometheus_")
        folder = pathlib.Path(self.folder.name)
        rules = RULES.read_text()
        for window in ("30m", "10m", "5m", "2m", "1h", "6h"):
            rules = rules.replace(f"[{window}]", "[4s]").replace(f"for: {window}\n", "for: 1s\n")
        (folder / "rules.yml").write_text(rules)
        (folder / "prometheus.yml").write_text(
            "global: {scrape_interval: 500ms, scrape_timeout: 400ms, evaluation_interval: 500ms}\n"
            "rule_files: [rules.yml]\n"
            "scrape_configs:\n"
            "  - job_name: minitron\n"
            f"    static_configs: [{{targets: ['127.0.0.1:{server.metrics_port}']}}]\n")
        self.log = open(folder / "log", "w+")
        self.process = subprocess.Popen(
            [tool("prometheus"), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
             "--web.listen-address=127.0.0.1:0"], stderr=self.log)
        self.port = wait_for("Prometheus", self._find_port)
        wait_for("Prometheus to be ready", self._is_ready)

    def _find_port(self):
        text = pathlib.Path(self.log.name).read_text()
        assert self.process.poll() is None, text
        found = re.search(r'Listening on" address=127\.0\.0\.1:(\d+)', text)
        return int(found.group(1)) if found else None

    def _is_ready(self):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=20) as answer:
                return answer.status == 200
        except OSError:
            return False

    def alerts(self):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/alerts", timeout=20) as answer:
            found = json.load(answer)["data"]["alerts"]
        return {a["labels"]["alertname"] for a in found if a["state"] == "firing"}

    def query(self, expression):
        url = f"http://127.0.0.1:{self.port}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(url, timeout=20) as answer:
            return json.load(answer)["data"]["result"]

    def close(self):
        self.process.kill()
        self.process.wait()
        self.log.close()
        self.folder.cleanup()


class AlertsFireTest(unittest.TestCase):
    def test_a_frozen_engine_fires_stuck_and_nothing_fires_before(self):
        with Server("--hang-timeout=3600") as server, grpc.insecure_channel(server.address) as channel:
            prometheus = Prometheus(server)
            self.addCleanup(prometheus.close)
            engine = busiest_thread(server, channel)
            wait_for("scrapes", lambda: prometheus.query("up == 1") and prometheus.query("minitron_ready == 1"))
            self.assertEqual(prometheus.alerts(), set())
            with FrozenThread(engine):
                call = stream(channel, generate_request(max_tokens=50))
                wait_for("the alert", lambda: "MinitronEngineStuck" in prometheus.alerts())
                self.assertGreater(server.metric("minitron_engine_heartbeat_age_seconds"), 0)
            self.assertTrue(ends_complete(list(call)), "it was only frozen")
            wait_for("the end of the alert", lambda: "MinitronEngineStuck" not in prometheus.alerts())

    def test_overload_fires_overload_and_the_refused_are_told_when_to_come_back(self):
        with Server("--max-num-sequences=1", "--max-queued-requests=1") as server:
            prometheus = Prometheus(server)
            self.addCleanup(prometheus.close)
            stop = threading.Event()
            refusals = []

            def load():
                with grpc.insecure_channel(server.address) as channel:
                    while not stop.is_set():
                        try:
                            list(stream(channel, generate_request(max_tokens=100)))
                        except grpc.RpcError as error:
                            refusals.append((error.code(), dict(error.trailing_metadata())))
                            stop.wait(0.02)

            threads = [threading.Thread(target=load) for _ in range(5)]
            for thread in threads:
                thread.start()
            try:
                wait_for("the alert", lambda: "MinitronOverload" in prometheus.alerts())
            finally:
                stop.set()
                for thread in threads:
                    thread.join()
            self.assertEqual({code for code, _ in refusals}, {grpc.StatusCode.UNAVAILABLE})
            self.assertTrue(all("grpc-retry-pushback-ms" in trailers for _, trailers in refusals))


class HangTest(unittest.TestCase):
    def test_a_frozen_engine_ends_the_process_with_code_6_and_an_idle_one_does_not(self):
        with Server("--hang-timeout=1") as server, grpc.insecure_channel(server.address) as channel:
            engine = busiest_thread(server, channel)
            with FrozenThread(engine) as frozen:
                time.sleep(2.5)  # idle for longer than the limit: the clock of a hang is the subject here
                self.assertEqual(health(server.address, "liveness"), 1)
                call = stream(channel, generate_request(max_tokens=50))
                frozen.wait_for_death()
                self.assertEqual(server.process.wait(60), 6)
            with self.assertRaises(grpc.RpcError) as raised:
                list(call)
            self.assertEqual(raised.exception.code(), grpc.StatusCode.UNAVAILABLE)
            self.assertIn("engine hung", server.log())


if __name__ == "__main__":
    unittest.main()
