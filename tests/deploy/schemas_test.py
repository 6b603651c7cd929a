#!/usr/bin/env python3
"""Every rendered manifest against the schemas of Kubernetes, KEDA, the Prometheus operator, the Gateway API and KServe,
unknown fields refused."""
import copy
import os
import sys
import unittest

import yaml

sys.path.insert(0, os.path.dirname(__file__))
import kustomize
import schemas
from kustomize import COMPONENTS, KUBERNETES, OVERLAYS, ROOT, with_components


def every_document():
    """(where, document) of all renderings."""
    renderings = {name: kustomize.render(KUBERNETES / "overlays" / name) for name in OVERLAYS}
    renderings.update({f"cpu+{name}": with_components(name) for name in COMPONENTS})
    renderings["kserve"] = [yaml.safe_load((ROOT / "deploy/kserve/clusterservingruntime.yaml").read_text())]
    return [(where, document) for where, documents in renderings.items() for document in documents]


def objects_in(value, path=()):
    """Paths of every map in it."""
    if isinstance(value, dict):
        yield path
        for key, item in value.items():
            yield from objects_in(item, path + (key,))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from objects_in(item, path + (index,))


def at(value, path):
    for key in path:
        value = value[key]
    return value


# Maps whose keys are the writer's own.
FREE = {"annotations", "labels", "matchLabels", "data", "requests", "limits"}
FREE_PATHS = {("Service", ("spec", "selector")), ("ScaledObject", ("spec", "triggers", 0, "metadata"))}


class SchemasTest(unittest.TestCase):
    def test_every_manifest_is_valid(self):
        checked = set()
        for where, document in every_document():
            with self.subTest(where=where, kind=document["kind"]):
                schemas.check(document)
                checked.add(f"{document['apiVersion']} {document['kind']}")
        self.assertLessEqual(set(schemas.FOREIGN), checked, "each kind that crds.yaml knows is one we ship")
        self.assertGreater(len(checked), 12)

    def test_a_misspelt_field_is_refused_wherever_it_stands(self):
        planted = 0
        for kind in sorted({document["kind"] for _, document in every_document()}):
            document = next(d for _, d in every_document() if d["kind"] == kind)
            for path in objects_in(document):
                if path and path[-1] in FREE or (kind, path) in FREE_PATHS:
                    continue
                broken = copy.deepcopy(document)
                at(broken, path)["misspelt"] = "x"
                with self.subTest(kind=kind, path=path), self.assertRaises(schemas.Invalid):
                    schemas.check(broken)
                planted += 1
        self.assertGreater(planted, 150)

    def test_a_wrong_type_and_a_missing_field_are_refused(self):
        documents = {d["kind"]: d for _, d in every_document()}
        for kind, path, value in (("ScaledObject", ("spec", "maxReplicaCount"), "8"),
                                  ("ScaledObject", ("spec", "triggers", 0, "metadata", "threshold"), 5),
                                  ("ScaledObject", ("spec", "triggers"), None),
                                  ("PodMonitor", ("spec", "podMetricsEndpoints", 0, "interval"), "10 seconds"),
                                  ("PodMonitor", ("spec", "selector"), None),
                                  ("PrometheusRule", ("spec", "groups", 0, "rules", 0, "expr"), None),
                                  ("InferencePool", ("spec", "appProtocol"), "h2c"),
                                  ("InferencePool", ("spec", "targetPorts", 0, "number"), 70000),
                                  ("GRPCRoute", ("spec", "rules", 0, "matches", 0, "method", "service"), "a/b"),
                                  ("GRPCRoute", ("spec", "rules", 0, "backendRefs", 0, "name"), None),
                                  ("ClusterServingRuntime", ("spec", "protocolVersions"), ["grpc"]),
                                  ("ClusterServingRuntime", ("spec", "containers", 0, "ports", 0, "containerPort"), "x"),
                                  ("Deployment", ("spec", "selector"), None)):
            broken = copy.deepcopy(documents[kind])
            if value is None:
                del at(broken, path[:-1])[path[-1]]
            else:
                at(broken, path[:-1])[path[-1]] = value
            with self.subTest(kind=kind, path=path), self.assertRaises(schemas.Invalid):
                schemas.check(broken)


if __name__ == "__main__":
    unittest.main()
