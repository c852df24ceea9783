"""A run as a RayJob of KubeRay (ray.io/v1): the operator makes a cluster for it, runs it and takes the cluster away.

Fields are those of KubeRay 1.7 (helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml).
"""

from __future__ import annotations

import hashlib
import re
import sys
from typing import Any

import yaml

from clusters.gpu import MIB
from clusters.workload import (
    HEAD_BYTES,
    HEAD_CPUS,
    OBJECT_STORE_BYTES,
    SHARED_MEMORY_BYTES,
    Workload,
)

LONGEST_NAME = 47
"""Of a RayJob; its cluster's and pods' names are made from it (ray-operator/controllers/ray/utils/constant.go)."""
FILES = "/etc/qlora"
QUEUE, PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
RETRIES = 2
"""Clusters that follow one that was lost with its head. The run in the output folder goes on from its checkpoint."""
KEPT_SECONDS = 60
"""A cluster whose run has ended keeps its GPUs so long."""


def render(workload: Workload) -> str:
    """Two documents of YAML: the ConfigMap with the run's specification, and the RayJob."""
    name = resource_name(workload.name)
    labels = {"app.kubernetes.io/name": "qlora-run", "app.kubernetes.io/managed-by": "qlora-orchestrator"}
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "labels": labels},
        "data": dict(workload.files),
    }
    queued = {
        label: value for label, value in ((QUEUE, workload.queue), (PRIORITY, workload.priority)) if value is not None
    }
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "labels": {**labels, **queued}},
        "spec": {
            "entrypoint": f"python -m launch.job --folder {FILES}",
            "entrypointNumCpus": 0,
            "metadata": dict(workload.metadata),
            **runtime_environment(workload),
            "backoffLimit": RETRIES,
            "shutdownAfterJobFinishes": True,  # Kueue wants it, and the GPUs are not ours to keep
            "ttlSecondsAfterFinished": KEPT_SECONDS,
            "rayClusterSpec": {
                "rayVersion": workload.ray_version,
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    # no worker of the run lands on the head
                    "rayStartParams": {"num-cpus": "0", "object-store-memory": str(OBJECT_STORE_BYTES)},
                    "template": template(workload, name, head=True),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "workers",
                        "replicas": workload.nodes,
                        "minReplicas": workload.nodes,
                        "maxReplicas": workload.nodes,
                        "rayStartParams": {"object-store-memory": str(OBJECT_STORE_BYTES)},
                        "template": template(workload, name, head=False),
                    }
                ],
            },
        },
    }
    return yaml.dump_all([config, job], Dumper=Readable, sort_keys=False, width=120)


class Readable(yaml.SafeDumper):
    """Writes texts of several lines as blocks, and what stands in two places twice."""

    def ignore_aliases(self, data: Any) -> bool:
        """Nobody reads anchors."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


Readable.add_representer(str, _text)


def resource_name(name: str) -> str:
    """`name` as Kubernetes takes it: a DNS label of at most 47 characters that begins with a letter; stable."""
    plain = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")
    plain = plain if plain[:1].isalpha() else f"run-{plain}".rstrip("-")
    if len(plain) <= LONGEST_NAME:
        return plain
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{plain[: LONGEST_NAME - len(digest) - 1].rstrip('-')}-{digest}"


def image_of(workload: Workload) -> str:
    """The image that is asked for, or Ray's own for this Python, with which the requirements were pinned."""
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    if workload.image is not None:
        return workload.image
    return f"rayproject/ray:{workload.ray_version}-{python}{'-gpu' if workload.gpus else ''}"


def runtime_environment(workload: Workload) -> dict[str, str]:
    """What Ray installs on each node where the image has not all that a run imports."""
    if workload.image is not None or not workload.requirements:
        return {}
    return {"runtimeEnvYAML": yaml.safe_dump({"pip": list(workload.requirements)}, width=120)}


def template(workload: Workload, name: str, *, head: bool) -> dict[str, Any]:
    """A pod's template: the head, which drives the run, or a node of workers."""
    memory = f"{-(-(HEAD_BYTES if head else workload.node_bytes) // MIB)}Mi"
    resources: dict[str, Any] = {"cpu": str(HEAD_CPUS if head else workload.node_cpus), "memory": memory}
    if workload.gpus and not head:
        resources["nvidia.com/gpu"] = str(workload.workers_per_node)
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]  # noqa: S108  # a pod's own
    volumes: list[dict[str, Any]] = [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{SHARED_MEMORY_BYTES // MIB}Mi"}}
    ]
    if workload.volume is not None:
        mounts.append({"name": "storage", "mountPath": workload.volume.mount})
        volumes.append({"name": "storage", "persistentVolumeClaim": {"claimName": workload.volume.claim}})
    container: dict[str, Any] = {
        "name": "ray-head" if head else "ray-worker",
        "image": image_of(workload),
        "resources": {"requests": resources, "limits": resources},
        "securityContext": {"allowPrivilegeEscalation": False},
        "volumeMounts": mounts,
    }
    if head:
        mounts.append({"name": "run", "mountPath": FILES, "readOnly": True})  # type: ignore[dict-item]
        volumes.append({"name": "run", "configMap": {"name": name}})
        ports = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
        container["ports"] = [{"name": port, "containerPort": number} for port, number in ports.items()]
    if workload.secret is not None:
        container["envFrom"] = [{"secretRef": {"name": workload.secret}}]
    spec: dict[str, Any] = {"containers": [container], "volumes": volumes}
    if not head:
        if workload.gpus:
            spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        if workload.node_labels:
            spec["nodeSelector"] = dict(workload.node_labels)
    return {"spec": spec}
