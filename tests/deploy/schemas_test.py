#!/usr/bin/env python3
"""Every rendered manifest against the schemas of Kubernetes, unknown fields refused. kubernetes-validate (PyPI) carries the
schemas; the kinds of other projects have none here and are only checked by manifests_test.py."""
import copy
import os
import sys
import unittest

import kubernetes_validate

sys.path.insert(0, os.path.dirname(__file__))
import kustomize
from kustomize import COMPONENTS, KUBERNETES, OVERLAYS, with_components

FOREIGN = {"ScaledObject", "PodMonitor", "PrometheusRule", "InferencePool", "GRPCRoute"}


class SchemasTest(unittest.TestCase):
    def check(self, document):
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)

    def test_every_manifest_is_valid(self):
        renderings = {name: kustomize.render(KUBERNETES / "overlays" / name) for name in OVERLAYS}
        renderings.update({f"cpu+{name}": with_components(name) for name in COMPONENTS})
        checked = 0
        for where, documents in renderings.items():
            for document in documents:
                if document["kind"] not in FOREIGN:
                    with self.subTest(where=where, kind=document["kind"]):
                        self.check(document)
                        checked += 1
        self.assertGreater(checked, 60)

    def test_a_field_nobody_knows_is_refused(self):
        deployment = next(d for d in kustomize.render(KUBERNETES / "base") if d["kind"] == "Deployment")
        broken = copy.deepcopy(deployment)
        broken["spec"]["template"]["spec"]["containers"][0]["redinessProbe"] = {}
        with self.assertRaises(kubernetes_validate.ValidationError):
            self.check(broken)


if __name__ == "__main__":
    unittest.main()
