#!/usr/bin/env python3
"""The Helm chart, rendered by Helm's own library: the policy and the schemas of the kustomizations hold for it, it makes the
same objects as they do, and its schema refuses bad values."""
import copy
import hashlib
import json
import os
import re
import sys
import unittest

import helm_python
import yaml

sys.path.insert(0, os.path.dirname(__file__))
import manifests_test
import schemas
from kustomize import ROOT, pod_spec

CHART = ROOT / "deploy/helm/minitron-server"


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


SUMS = "0" * 64 + "  model.safetensors\n"
GPU = {"requests": {"cpu": "4", "memory": "24Gi"}, "limits": {"cpu": "8", "memory": "24Gi"}}
# What of the kustomizations each set of values stands for.
VALUES = {
    "cpu": {},
    "gpu": {"gpu": {"enabled": True}, "model": {"source": "pvc"}, "resources": GPU},
    "hpa": {"autoscaling": {"kind": "hpa"}},
    "keda": {"autoscaling": {"kind": "keda"}},
    "inference-gateway": {"inferenceGateway": {"enabled": True}},
    "monitoring": {"monitoring": {"enabled": True}},
    "cpu+auth": {"auth": {"secretName": "minitron-auth"}},
    "cpu+tls": {"tls": {"secretName": "minitron-tls"}},
    "cpu+model-pvc": {"model": {"source": "pvc"}},
    "cpu+model-image": {"model": {"source": "image"}},
    "cpu+model-download": {"model": {"source": "download", "download": {"sha256sums": SUMS}}},
    "cpu+tokenizer-pin": {"model": {"tokenizerSha256": sha256(ROOT / "deploy/models/minitron-tiny/tokenizer.model")}},
    "cpu+all": {"model": {"source": "pvc"}, "tls": {"secretName": "minitron-tls"}, "auth": {"secretName": "minitron-auth"}},
}


def render(values, name="minitron"):
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        files = chart.render(values, name=name, namespace="default")
    return [d for text in files.values() for d in yaml.safe_load_all(text) if d]


OF_THE_TOOL = {"app.kubernetes.io/instance", "app.kubernetes.io/managed-by", "app.kubernetes.io/part-of",
               "app.kubernetes.io/version", "helm.sh/chart"}


def comparable(value, key=""):
    """Without the labels that say which tool made an object, generated names cut, lists of named things sorted."""
    if isinstance(value, dict):
        return {k: comparable(v, k) for k, v in value.items() if k not in OF_THE_TOOL and k != "annotations"}
    if isinstance(value, list):
        value = [comparable(v) for v in value]
        return sorted(value, key=lambda v: v["name"]) if key in ("env", "volumes", "volumeMounts") else value
    if key == "server.json":
        return json.loads(value)
    if key == "SHA256SUMS":
        return None  # the operator's
    return re.sub(r"^(minitron-(?:config|epp-config|model-files))-[0-9a-f]{10}$", r"\1", value) if key == "name" else value


def by_name(documents):
    found = {}
    for document in map(comparable, copy.deepcopy(documents)):
        labels = document["metadata"].pop("labels", {})  # the manifests' own are the policy's matter
        assert document["kind"] == "ConfigMap" or labels["app.kubernetes.io/name"] == "minitron", document["metadata"]
        found[f"{document['kind']} {document['metadata']['name']}"] = document
    return found


class ChartPolicy(manifests_test.Policy):
    """Every rule for the manifests holds for what the chart makes."""

    @classmethod
    def render_all(cls):
        return {**super().render_all(), **{name: render(values) for name, values in VALUES.items()}}


class ChartTest(unittest.TestCase):
    maxDiff = None

    def test_it_makes_what_the_kustomizations_make(self):
        kustomized = manifests_test.Policy.render_all()
        self.assertEqual(set(kustomized), set(VALUES), "one for one")
        for name, values in VALUES.items():
            ours, theirs = by_name(render(values)), by_name(kustomized[name])
            if name == "monitoring":  # an overlay that stands beside another
                ours = {k: v for k, v in ours.items() if k in theirs}
            for key in sorted(set(ours) | set(theirs)):
                with self.subTest(values=name, document=key):
                    self.assertEqual(ours.get(key), theirs.get(key))

    def test_every_object_is_valid(self):
        checked = 0
        for name, values in VALUES.items():
            for document in render(values):
                with self.subTest(values=name, kind=document["kind"]):
                    schemas.check(document)
                    checked += 1
        self.assertGreater(checked, 70)

    def test_helm_has_nothing_to_say_but_about_the_icon(self):
        report = helm_python.lint(CHART, strict=True)
        self.assertEqual(report["errors"], [])
        self.assertEqual([m["error"] for m in report["messages"]], ["icon is recommended"])

    def test_two_releases_do_not_meet(self):
        one, two = by_name(render({}, "one")), by_name(render({}, "two"))
        self.assertFalse(set(one) & set(two))
        for d in render({}, "one"):
            if d["kind"] == "Service":
                self.assertEqual(d["spec"]["selector"]["app.kubernetes.io/instance"], "one")

    def test_what_is_switched_off_is_not_there(self):
        kinds = {d["kind"] for d in render({"networkPolicy": {"enabled": False}, "podDisruptionBudget": {"enabled": False}})}
        self.assertEqual(kinds, {"Deployment", "ConfigMap", "Service", "ServiceAccount"})

    def test_ports_and_drain_times_are_said_once(self):
        config = {"port": 6000, "metrics-port": 6001, "health-port": 6002, "drain-delay": 7.5, "drain-timeout": 100}
        documents = render({"config": config, "inferenceGateway": {"enabled": True}})
        pod = pod_spec(next(d for d in documents if d["kind"] == "Deployment"))
        self.assertEqual({p["name"]: p["containerPort"] for p in pod["containers"][0]["ports"]},
                         {"grpc": 6000, "metrics": 6001, "health": 6002})
        self.assertEqual(pod["terminationGracePeriodSeconds"], 123)
        for d in documents:
            if d["kind"] == "Service":
                self.assertEqual(d["spec"]["ports"][0]["port"], 6000)
            if d["kind"] == "InferencePool":
                self.assertEqual(d["spec"]["targetPorts"], [{"number": 6000}])
            if "epp-config.yaml" in d.get("data", {}):
                picker = yaml.safe_load(d["data"]["epp-config.yaml"])
                self.assertEqual(next(p for p in picker["plugins"] if p["type"] == "metrics-data-source")["parameters"], {"port": 6001})

    def test_a_changed_configuration_is_a_new_pod(self):
        def annotation(values):
            deployment = next(d for d in render(values) if d["kind"] == "Deployment")
            return deployment["spec"]["template"]["metadata"]["annotations"]["checksum/config"]

        self.assertNotEqual(annotation({}), annotation({"config": {"max-num-sequences": 8}}))

    def test_bad_values_are_refused_by_name(self):
        cases = {
            "replica": {"replica": 2},
            "replicas": {"replicas": "two"},
            "tag": {"image": {"tag": "latest"}},
            "repository": {"image": {"repository": "Not An Image"}},
            "port": {"config": {"port": 80}},
            "health-port": {"config": {"health-port": 70000}},
            "drain-delay": {"config": {"drain-delay": 0}},
            "Max_Tokens": {"config": {"Max_Tokens": 3}},
            "max-num-sequences": {"config": {"max-num-sequences": [3]}},
            "source": {"model": {"source": "s3"}},
            "tokenizerSha256": {"model": {"tokenizerSha256": "A" * 64}},
            "url": {"model": {"download": {"url": "http://models.example.com"}}},
            "sha256sums": {"model": {"source": "download"}},
            "memory": {"resources": {"limits": {"memory": "1G"}}},
            "nvidia": {"resources": {"limits": {"nvidia": "1"}}},
            "kind": {"autoscaling": {"kind": "cpu"}},
            "failureMode": {"inferenceGateway": {"endpointPicker": {"failureMode": "Open"}}},
            "gateway": {"inferenceGateway": {"gateway": "No Name"}},
            "minReplicas": {"autoscaling": {"minReplicas": 0}},
            "secretName": {"tls": {"secretName": "Not A Name"}},
            "enabled": {"monitoring": {"enabled": "yes"}},
        }
        for name, values in cases.items():
            with self.subTest(name), helm_python.Chart.load(CHART) as chart:
                with self.assertRaises(helm_python.HelmValuesError) as refused:
                    chart.validate_schema(copy.deepcopy(values))
                self.assertIn(name, str(refused.exception))


if __name__ == "__main__":
    unittest.main()
