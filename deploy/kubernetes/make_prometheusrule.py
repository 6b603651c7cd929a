#!/usr/bin/env python3
"""Writes overlays/monitoring/prometheusrule.yaml: the rules of ../prometheus/rules.yml as the operator takes them.

Usage: make_prometheusrule.py [--check]     --check: fails when the file is not what this program writes
"""
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
HEAD = """# Written by make_prometheusrule.py from ../../../prometheus/rules.yml: change that.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: minitron
  labels: {app.kubernetes.io/name: minitron}
spec:
"""


def main():
    lines = (HERE / "../prometheus/rules.yml").read_text().splitlines()
    body = [line for line in lines if not line.lstrip().startswith("#")]
    text = HEAD + "".join(("  " + line).rstrip() + "\n" for line in body)
    path = HERE / "overlays/monitoring/prometheusrule.yaml"
    if sys.argv[1:] == ["--check"]:
        sys.exit(0 if path.read_text() == text else f"{path.name} is not what {pathlib.Path(__file__).name} writes")
    path.write_text(text)


if __name__ == "__main__":
    main()
