"""Validates an object as the API server would, unknown fields refused: Kubernetes' kinds by the schemas that kubernetes-validate
(PyPI) carries, those of other projects by crds.yaml."""
import pathlib

import jsonschema
import kubernetes_validate
import yaml

TEXT = yaml.safe_load((pathlib.Path(__file__).parent / "crds.yaml").read_text())


class Invalid(Exception):
    pass


def closed(schema):
    """The schema with no object open to fields that it does not name."""
    if isinstance(schema, list):
        return [closed(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        result["additionalProperties"] = False
    return result


FOREIGN = {kind: jsonschema.Draft7Validator({**closed(schema), "definitions": closed(TEXT["definitions"])})
           for kind, schema in TEXT["kinds"].items()}


def check_native(document):
    try:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        raise Invalid(str(error)) from error


def check(document):
    """Raises Invalid, naming the field."""
    kind = f"{document.get('apiVersion')} {document.get('kind')}"
    if kind not in FOREIGN:
        return check_native(document)
    if set(document) != {"apiVersion", "kind", "metadata", "spec"}:
        raise Invalid(f"{kind}: {sorted(document)}")
    error = next(FOREIGN[kind].iter_errors(document["spec"]), None)
    if error:
        raise Invalid(f"{kind}: {error.json_path}: {error.message}")
    check_native({"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]})
    if "containers" in document["spec"]:
        check_native({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"},
                      "spec": {"containers": document["spec"]["containers"]}})
