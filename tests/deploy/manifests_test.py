#!/usr/bin/env python3
"""Policy of deploy/: what every rendered manifest must be, and that names, ports and numbers agree with the program."""
import json
import os
import pathlib
import re
import subprocess
import sys
import unittest

import yaml

sys.path.insert(0, os.path.dirname(__file__))
import kustomize
from harness import SERVER
from kustomize import COMPONENTS, KUBERNETES, OVERLAYS, ROOT, with_components

SERVICES = {"liveness", "minitron.v1.GenerationService", "minitron.v1.ModelService"}


def flags():
    text = subprocess.run([SERVER, "--help"], capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"^  --([a-z0-9-]+)=?(\S*)", text, re.M))


def find(documents, kind, name=None):
    found = [d for d in documents if d["kind"] == kind and name in (None, d["metadata"]["name"])]
    assert found, f"no {kind} {name or ''}"
    return found[0]


def megabytes(quantity):
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()
    return int(number) * (1024 if unit == "Gi" else 1)


class Policy(unittest.TestCase):
    """The rules, applied to every rendering there is."""

    @classmethod
    def render_all(cls):
        renderings = {name: kustomize.render(KUBERNETES / "overlays" / name) for name in OVERLAYS}
        renderings.update({f"cpu+{name}": with_components(name) for name in COMPONENTS})
        renderings["cpu+all"] = with_components("model-pvc", "tls", "auth")
        return renderings

    @classmethod
    def setUpClass(cls):
        cls.flags = flags()
        cls.renderings = cls.render_all()
        kserve = yaml.safe_load((ROOT / "deploy/kserve/clusterservingruntime.yaml").read_text())
        cls.renderings["kserve"] = [kserve]
        # Every pod there is: (where, pod spec, labels of the pod or None, the config file or None).
        cls.pods = []
        for where, documents in cls.renderings.items():
            for d in documents:
                if d["kind"] == "Deployment":
                    config = next(c for c in documents if c["metadata"]["name"].startswith("minitron-config"))
                    cls.pods.append((where, kustomize.pod_spec(d), d["spec"]["template"]["metadata"]["labels"],
                                     json.loads(config["data"]["server.json"])))
        cls.runtime = kserve["spec"]

    def each_pod(self):
        for where, pod, labels, config in self.pods:
            with self.subTest(where=where):
                yield pod, labels, config

    def each_container(self):
        for where, pod, _, _ in self.pods:
            for container in pod["containers"] + pod.get("initContainers", []):
                with self.subTest(where=where, container=container["name"]):
                    yield container
        with self.subTest(where="kserve"):
            yield self.runtime["containers"][0]

    def each_server(self):
        """(container, options by name) of every container that runs our program."""
        for where, pod, _, config in self.pods:
            with self.subTest(where=where):
                options = dict(config)
                for variable in pod["containers"][0].get("env", []):
                    name = variable["name"]
                    self.assertTrue(name.startswith("MINITRON_SERVER_"), name)
                    options[name[len("MINITRON_SERVER_"):].lower().replace("_", "-")] = variable["value"]
                yield pod["containers"][0], options
        with self.subTest(where="kserve"):
            container = self.runtime["containers"][0]
            yield container, dict(a[2:].split("=", 1) for a in container["args"])

    # The container's cage.
    def test_01_nobody_is_root(self):
        for pod, _, _ in self.each_pod():
            self.assertTrue(pod["securityContext"]["runAsNonRoot"])
            self.assertGreaterEqual(pod["securityContext"]["runAsUser"], 10000)

    def test_02_no_privilege_is_gained_or_kept(self):
        for container in self.each_container():
            self.assertFalse(container["securityContext"]["allowPrivilegeEscalation"])
            self.assertEqual(container["securityContext"]["capabilities"], {"drop": ["ALL"]})
            self.assertNotIn("privileged", container["securityContext"])

    def test_03_root_file_systems_are_read_only(self):
        for container in self.each_container():
            self.assertTrue(container["securityContext"]["readOnlyRootFilesystem"])

    def test_04_seccomp_is_the_runtimes_default(self):
        for pod, _, _ in self.each_pod():
            self.assertEqual(pod["securityContext"]["seccompProfile"], {"type": "RuntimeDefault"})

    def test_05_no_account_token_and_no_service_links(self):
        for pod, _, _ in self.each_pod():
            self.assertFalse(pod["automountServiceAccountToken"])
            self.assertFalse(pod["enableServiceLinks"])

    def test_06_nothing_of_the_host_is_shared(self):
        for pod, _, _ in self.each_pod():
            for key in ("hostNetwork", "hostPID", "hostIPC"):
                self.assertNotIn(key, pod)
            self.assertFalse([v for v in pod["volumes"] if "hostPath" in v])

    def test_07_requests_and_limits_are_set_and_memory_is_guaranteed(self):
        for container in self.each_container():
            resources = container["resources"]
            self.assertEqual(set(resources["requests"]), set(resources["limits"]))
            if container["name"] in ("server", "kserve-container"):
                self.assertEqual(resources["requests"]["memory"], resources["limits"]["memory"])

    def test_08_images_are_named_and_never_latest(self):
        for container in self.each_container():
            self.assertRegex(container["image"], r"^[a-z0-9./-]+/[a-z0-9./-]+:[a-z0-9.]+$")
            self.assertNotIn("latest", container["image"])

    # Health.
    def test_09_three_probes_by_grpc_on_the_health_port(self):
        for container, options in self.each_server():
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                self.assertEqual(container[probe]["grpc"]["port"], int(options["health-port"]))

    def test_10_probes_ask_for_services_that_exist_and_mean_it(self):
        for container, _ in self.each_server():
            self.assertEqual(container["livenessProbe"]["grpc"]["service"], "liveness")
            self.assertIn(container["readinessProbe"]["grpc"]["service"], SERVICES - {"liveness"})
        code = (ROOT / "server/grpc_server.cc").read_text()
        for service in SERVICES:
            self.assertIn(f'"{service}"', code)

    def test_11_liveness_is_slower_than_readiness_and_start_up_has_minutes(self):
        for container, _ in self.each_server():
            def seconds(probe):
                return container[probe].get("periodSeconds", 10) * container[probe].get("failureThreshold", 3)
            self.assertGreater(seconds("livenessProbe"), seconds("readinessProbe"))
            self.assertGreaterEqual(seconds("startupProbe"), 600)

    # Options, ports, files.
    def test_12_every_option_is_one_the_program_has(self):
        for _, options in self.each_server():
            self.assertLessEqual(set(options), set(self.flags))

    def test_13_container_ports_are_the_options_ports(self):
        for container, options in self.each_server():
            ports = {p["name"]: p["containerPort"] for p in container["ports"]}
            grpc = ports.get("grpc", ports.get("h2c"))
            self.assertEqual(grpc, int(options["port"]))
            self.assertEqual(ports["metrics"], int(options["metrics-port"]))
            self.assertEqual(ports["health"], int(options["health-port"]))

    def test_14_the_program_takes_the_config_files(self):
        for _, _, config in self.each_pod():
            path = pathlib.Path(os.environ.get("TMPDIR", "/tmp")) / f"minitron_config_{os.getpid()}.json"
            path.write_text(json.dumps(config))
            try:
                result = subprocess.run([SERVER, f"--config={path}", "--version"], capture_output=True, text=True)
            finally:
                path.unlink()
            self.assertEqual(result.returncode, 0, result.stderr)

    def test_15_every_mount_has_its_volume_and_every_volume_a_mount(self):
        for pod, _, _ in self.each_pod():
            mounted = {m["name"] for c in pod["containers"] + pod.get("initContainers", []) for m in c["volumeMounts"]}
            self.assertEqual(mounted, {v["name"] for v in pod["volumes"]})

    def test_16_the_server_mounts_everything_read_only(self):
        for pod, _, _ in self.each_pod():
            for mount in pod["containers"][0]["volumeMounts"]:
                self.assertTrue(mount["readOnly"], mount)

    def test_17_files_that_options_name_are_below_a_mount(self):
        for container, options in self.each_server():
            for name in ("tls-cert", "tls-key", "auth-file", "model"):
                if name in options and "volumeMounts" in container:
                    mounts = [m["mountPath"] for m in container["volumeMounts"]]
                    self.assertTrue(any(options[name] == m or options[name].startswith(m + "/") for m in mounts), name)

    def test_18_config_maps_that_are_mounted_exist(self):
        for where, documents in self.renderings.items():
            names = {d["metadata"]["name"] for d in documents if d["kind"] == "ConfigMap"}
            for d in documents:
                for volume in (kustomize.pod_spec(d) or {}).get("volumes", []):
                    if "configMap" in volume:
                        self.assertIn(volume["configMap"]["name"], names, where)

    # Drain.
    def test_19_the_grace_period_covers_the_drain(self):
        for pod, _, config in self.each_pod():
            drain = config["drain-delay"] + config["drain-timeout"]
            self.assertGreaterEqual(pod["terminationGracePeriodSeconds"], drain + 10)
            self.assertGreaterEqual(config["drain-delay"], 5, "endpoints are withdrawn while requests still come")

    def test_20_a_roll_out_never_takes_all_pods(self):
        for where, documents in self.renderings.items():
            for d in documents:
                if d["kind"] == "Deployment":
                    update = d["spec"]["strategy"]["rollingUpdate"]
                    self.assertEqual(update["maxSurge"] + update["maxUnavailable"], 1, where)
                    self.assertEqual(find(documents, "PodDisruptionBudget")["spec"]["maxUnavailable"], 1)

    # Names that must meet.
    def test_21_selectors_match_the_pods_labels(self):
        for where, documents in self.renderings.items():
            if not any(d["kind"] == "Deployment" for d in documents):
                continue
            labels = find(documents, "Deployment")["spec"]["template"]["metadata"]["labels"]
            for d in documents:
                spec = d.get("spec", {})
                selector = {"Service": lambda s: s["selector"], "Deployment": lambda s: s["selector"]["matchLabels"],
                            "PodDisruptionBudget": lambda s: s["selector"]["matchLabels"],
                            "NetworkPolicy": lambda s: s["podSelector"]["matchLabels"],
                            "InferencePool": lambda s: s["selector"]["matchLabels"]}.get(d["kind"])
                if selector:
                    self.assertLessEqual(selector(spec).items(), labels.items(), f"{where} {d['kind']}")
        monitor = find(self.renderings["monitoring"], "PodMonitor")["spec"]
        self.assertLessEqual(monitor["selector"]["matchLabels"].items(), self.pods[0][2].items())

    def test_22_named_ports_exist_in_the_pod(self):
        names = {p["name"] for p in self.pods[0][1]["containers"][0]["ports"]}
        for documents in self.renderings.values():
            for d in documents:
                if d["kind"] == "Service":
                    self.assertLessEqual({p["targetPort"] for p in d["spec"]["ports"]}, names)
                if d["kind"] == "NetworkPolicy":
                    for rule in d["spec"].get("ingress", []):
                        self.assertLessEqual({p["port"] for p in rule["ports"]}, names)
                if d["kind"] == "PodMonitor":
                    self.assertLessEqual({e["port"] for e in d["spec"]["podMetricsEndpoints"]}, names)

    def test_23_one_service_is_headless_for_clients_that_balance(self):
        services = [d for d in self.renderings["cpu"] if d["kind"] == "Service"]
        self.assertEqual(sorted(s["spec"].get("clusterIP", "") for s in services), ["", "None"])
        for service in services:
            self.assertEqual(service["spec"]["ports"][0]["appProtocol"], "kubernetes.io/h2c")

    def test_24_the_network_is_closed_but_for_what_is_named(self):
        policy = find(self.renderings["cpu"], "NetworkPolicy")["spec"]
        self.assertEqual(policy["policyTypes"], ["Ingress", "Egress"])
        self.assertTrue(all(rule.get("from") and rule.get("ports") for rule in policy["ingress"]))
        self.assertEqual({p["port"] for rule in policy["egress"] for p in rule["ports"]}, {53})

    def test_25_autoscalers_scale_the_deployment_on_waiting_requests_and_slowly_down(self):
        hpa = find(self.renderings["hpa"], "HorizontalPodAutoscaler")["spec"]
        keda = find(self.renderings["keda"], "ScaledObject")["spec"]
        for name, spec in (("hpa", hpa), ("keda", keda)):
            target = spec["scaleTargetRef"]
            find(self.renderings[name], target["kind"], target["name"])
            self.assertNotIn("replicas", find(self.renderings[name], "Deployment")["spec"])
        self.assertEqual(hpa["metrics"][0]["pods"]["metric"]["name"], "minitron_requests_waiting")
        self.assertIn("minitron_requests_waiting", keda["triggers"][0]["metadata"]["query"])
        self.assertNotIn("metricName", keda["triggers"][0]["metadata"])
        self.assertGreaterEqual(hpa["behavior"]["scaleDown"]["stabilizationWindowSeconds"], 300)
        self.assertGreaterEqual(keda["cooldownPeriod"], 300)

    def test_26_metrics_that_manifests_name_are_exported(self):
        code = "".join(p.read_text() for p in (ROOT / "server").glob("*metrics*.cc"))
        text = "".join(p.read_text() for p in KUBERNETES.glob("overlays/*/*.yaml") if p.name != "prometheusrule.yaml")
        names = set(re.findall(r"\bminitron_[a-z_]+\b", text))
        self.assertGreater(len(names), 4)
        for name in names:
            self.assertIn(f'"{name}"', code)

    def test_27_the_operators_rules_are_the_shipped_rules(self):
        subprocess.run([sys.executable, KUBERNETES / "make_prometheusrule.py", "--check"], check=True)
        rule = find(self.renderings["monitoring"], "PrometheusRule")["spec"]
        self.assertEqual(rule, yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text()))

    def test_28_the_pool_and_the_route_point_at_the_server(self):
        documents = self.renderings["inference-gateway"]
        pool = find(documents, "InferencePool")["spec"]
        self.assertEqual(pool["targetPorts"], [{"number": self.pods[0][3]["port"]}])
        route = find(documents, "GRPCRoute")["spec"]["rules"][0]
        protos = "".join(p.read_text() for p in (ROOT / "proto/minitron/v1").glob("*.proto"))
        for match in route["matches"]:
            package, _, service = match["method"]["service"].rpartition(".")
            self.assertIn(f"service {service} {{", protos)
            self.assertEqual(package, "minitron.v1")
            self.assertNotEqual(service, "AdminService", "operators do not come through the gateway")
        self.assertEqual(route["backendRefs"][0]["kind"], "InferencePool")

    def test_29_the_gpu_overlay_asks_for_a_gpu_and_says_so_to_the_server(self):
        pod = kustomize.pod_spec(find(self.renderings["gpu"], "Deployment"))
        server = pod["containers"][0]
        self.assertEqual(server["resources"]["limits"]["nvidia.com/gpu"], "1")
        self.assertIn({"name": "MINITRON_SERVER_BACKEND", "value": "cuda"}, server["env"])
        self.assertGreaterEqual(megabytes(server["resources"]["limits"]["memory"]), 18 * 1024, "the weights pass through it")

    def test_30_downloads_are_checked_before_the_server_starts(self):
        pod = kustomize.pod_spec(find(self.renderings["cpu+model-download"], "Deployment"))
        self.assertEqual(len(pod["initContainers"]), 1)
        script = (KUBERNETES / "components/model-download/download.sh").read_text()
        self.assertIn("sha256sum --check --strict", script)
        subprocess.run(["sh", "-n"], input=script, text=True, check=True)

    def test_31_every_object_says_what_it_belongs_to(self):
        for name in ("cpu", "gpu", "keda", "hpa"):
            for d in self.renderings[name]:
                if d["kind"] != "ConfigMap":
                    self.assertEqual(d["metadata"]["labels"]["app.kubernetes.io/name"], "minitron", d["metadata"]["name"])

    def test_32_no_yaml_key_twice_and_no_tabs(self):
        class Strict(yaml.SafeLoader):
            pass

        def mapping(loader, node):
            keys = [k.value for k, _ in node.value]
            assert len(keys) == len(set(keys)), f"{node.start_mark}: {keys}"
            return yaml.SafeLoader.construct_mapping(loader, node, deep=True)

        Strict.add_constructor("tag:yaml.org,2002:map", mapping)
        files = [p for e in ("yaml", "yml") for p in (ROOT / "deploy").rglob(f"*.{e}")
                 if p.parent.name != "templates"]
        self.assertGreater(len(files), 25)
        for path in files:
            self.assertNotIn("\t", path.read_text(), path)
            list(yaml.load_all(path.read_text(), Strict))

    # Compose and systemd.
    def test_33_compose_mounts_files_that_exist_and_cages_the_server(self):
        folder = ROOT / "deploy/compose"
        services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
        for service in services.values():
            for volume in service.get("volumes", []):
                source = re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", volume).split(":")[0]
                self.assertTrue((folder / source).exists(), source)
        server = services["minitron"]
        self.assertTrue(server["read_only"])
        self.assertEqual(server["cap_drop"], ["ALL"])
        for argument in server["command"]:
            self.assertIn(argument[2:].split("=")[0], self.flags)
        for service in services.values():
            self.assertTrue(all(p.startswith("127.0.0.1:") for p in service["ports"]))

    def test_34_the_unit_waits_longer_than_a_drain_and_does_not_retry_the_hopeless(self):
        unit = (ROOT / "deploy/systemd/minitron-server.service").read_text()
        stop = int(re.search(r"^TimeoutStopSec=(\d+)$", unit, re.M).group(1))
        self.assertGreater(stop, float(self.flags["drain-timeout"]) + float(self.flags["drain-delay"]) + 5)
        codes = dict(re.findall(r"k(\w+) = (\d+)", re.search(r"enum ExitCode \{(.*)\}", (ROOT / "server/serving.h").read_text()).group(1)))
        never = re.search(r"^RestartPreventExitStatus=(.*)$", unit, re.M).group(1).split()
        self.assertEqual(sorted(never), sorted(codes[c] for c in ("ExitUsage", "ExitModel", "ExitPort")))
        for option in ("NoNewPrivileges=yes", "ProtectSystem=strict", "DynamicUser=yes", "CapabilityBoundingSet="):
            self.assertIn(option, unit)


if __name__ == "__main__":
    unittest.main()
