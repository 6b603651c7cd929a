"""Renders the kustomizations of deploy/kubernetes: the features they use, and an error for any other. The distribution
has no kustomize; the real one was compared by hand (deploy/README.md says which version)."""
import copy
import hashlib
import json
import pathlib

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy/kubernetes"
OVERLAYS = sorted(p.name for p in (KUBERNETES / "overlays").iterdir())
COMPONENTS = sorted(p.name for p in (KUBERNETES / "components").iterdir())

KNOWN = {"apiVersion", "kind", "resources", "components", "patches", "images", "labels", "configMapGenerator"}
MERGE_KEYS = {"containers": "name", "initContainers": "name", "volumes": "name", "env": "name",
              "volumeMounts": "mountPath", "ports": "containerPort"}


def merge(target, patch, name=""):
    """Strategic merge: maps key by key, known lists by their key, other values replaced, null removes."""
    if isinstance(target, dict) and isinstance(patch, dict):
        for key, value in patch.items():
            if value is None:
                target.pop(key, None)
            elif key in target:
                target[key] = merge(target[key], value, key)
            else:
                target[key] = copy.deepcopy(value)
        return target
    if isinstance(target, list) and isinstance(patch, list) and name in MERGE_KEYS:
        key = MERGE_KEYS[name]
        for item in patch:
            same = [t for t in target if t.get(key) == item.get(key)]
            if same:
                merge(same[0], item)
            else:
                target.append(copy.deepcopy(item))
        return target
    return copy.deepcopy(patch)


def pod_spec(document):
    return document.get("spec", {}).get("template", {}).get("spec")


def apply(folder, documents):
    """The documents with what one kustomization adds and changes."""
    config = yaml.safe_load((folder / "kustomization.yaml").read_text())
    unknown = set(config) - KNOWN
    if unknown:
        raise ValueError(f"{folder}: {unknown} is not known to this renderer")
    for entry in config.get("resources", []):
        path = folder / entry
        if path.is_dir():
            documents += apply(path.resolve(), [])
        else:
            documents += [d for d in yaml.safe_load_all(path.read_text()) if d]
    names = {}
    for generator in config.get("configMapGenerator", []):
        data = {pathlib.Path(f).name: (folder / f).read_text() for f in generator["files"]}
        digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:10]
        names[generator["name"]] = f"{generator['name']}-{digest}"
        documents.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": names[generator["name"]]}, "data": data})
    for entry in config.get("components", []):
        documents = apply((folder / entry).resolve(), documents)
    for entry in config.get("patches", []):
        patch = yaml.safe_load((folder / entry["path"]).read_text())
        hit = [d for d in documents if (d["kind"], d["metadata"]["name"]) == (patch["kind"], patch["metadata"]["name"])]
        if len(hit) != 1:
            raise ValueError(f"{folder}/{entry['path']}: changes {len(hit)} documents")
        merge(hit[0], patch)
    for document in documents:
        spec = pod_spec(document) or {}
        for volume in spec.get("volumes", []):
            reference = volume.get("configMap", {})
            reference["name"] = names.get(reference.get("name"), reference.get("name"))
            if not reference["name"]:
                del reference["name"]
        for container in spec.get("containers", []) + spec.get("initContainers", []):
            for image in config.get("images", []):
                if container["image"] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
        for label in config.get("labels", []):
            document["metadata"].setdefault("labels", {}).update(label["pairs"])
    return documents


def with_components(*names):
    """The cpu overlay with these components."""
    documents = render(KUBERNETES / "overlays/cpu")
    for name in names:
        documents = apply(KUBERNETES / "components" / name, documents)
    return documents


def render(folder):
    return apply(pathlib.Path(folder).resolve(), [])
