"""A pool as a cluster of Ray's own launcher: `ray up FILE` makes it, `qlora-submit` then submits to its head.

Fields are those of ray/autoscaler/ray-schema.json of Ray 2.60.
"""

from __future__ import annotations

from typing import Any

import yaml

from clusters.cluster import Cluster, Pool
from clusters.errors import Problem, RequestError, request_error
from clusters.workload import Workload

HEAD_PORT = 6379
STOP = "ray stop"


def render(workload: Workload, cluster: Cluster, pool: Pool) -> str:
    """The YAML of `ray up`.

    Raises:
        RequestError: the description says neither which machines there are nor what AWS calls them.
    """
    if pool.hosts:
        fields = of_hosts(workload, pool)
    elif pool.instance_type is not None and cluster.region is not None:
        fields = on_aws(workload, cluster.region, pool.instance_type)
    else:
        rule = "it says neither the hosts of that pool, nor its instance_type and the cluster's region"
        raise request_error("--cluster", f"{cluster.source}, pool {pool.name}", rule, "Add them (docs/clusters.md)")
    fields = {"cluster_name": workload.name, **fields}
    if workload.image is not None:
        fields["docker"] = {"image": workload.image, "container_name": "ray"}
    else:
        requirements = [f"ray[default,train]=={workload.ray_version}", *workload.requirements]
        fields["setup_commands"] = [f"pip install {' '.join(map(repr, requirements))}"]
    # the dashboard listens on the head's loopback; `ray dashboard FILE` forwards a port of this machine to it
    fields["head_start_ray_commands"] = [
        STOP,
        f"ray start --head --port={HEAD_PORT} --dashboard-host=127.0.0.1 "
        "--autoscaling-config=~/ray_bootstrap_config.yaml",
    ]
    fields["worker_start_ray_commands"] = [STOP, f"ray start --address=$RAY_HEAD_IP:{HEAD_PORT}"]
    return yaml.safe_dump(fields, sort_keys=False, width=120)


def of_hosts(workload: Workload, pool: Pool) -> dict[str, Any]:
    """Machines that there are: the first is the head, and all have workers.

    Raises:
        RequestError: there are fewer than the plan has nodes, or nobody is named who logs in.
    """
    problems = []
    if len(pool.hosts) < workload.nodes:
        rule = f"the plan has {workload.nodes} nodes, and {len(pool.hosts)} hosts are named"
        problems.append(Problem("--cluster", f"pool {pool.name}", rule, "Name more, or plan for fewer workers"))
    if pool.ssh_user is None:  # Ray has a default on clouds only
        rule = "it names hosts, and not who logs in there over SSH"
        problems.append(Problem("--cluster", f"pool {pool.name}", rule, "Add ssh_user"))
    if problems:
        raise RequestError(problems)
    head, *others = pool.hosts[: workload.nodes]
    return {
        "max_workers": len(others),
        "provider": {"type": "local", "head_ip": head, "worker_ips": others},
        "auth": {"ssh_user": pool.ssh_user},
    }


def on_aws(workload: Workload, region: str, instance_type: str) -> dict[str, Any]:
    """Machines that AWS makes."""
    return {
        "max_workers": workload.nodes,
        "provider": {"type": "aws", "region": region},
        "available_node_types": {
            "head": {"node_config": {"InstanceType": HEAD_INSTANCE}, "resources": {"CPU": 0}},
            "workers": {
                "node_config": {"InstanceType": instance_type},
                "resources": {},
                "min_workers": workload.nodes,
                "max_workers": workload.nodes,
            },
        },
        "head_node_type": "head",
    }


HEAD_INSTANCE = "m5.xlarge"
"""AWS's name of a machine with 4 cores and 16 GiB: the head has no GPU."""
