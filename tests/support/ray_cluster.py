"""A Ray cluster of CPU nodes on this machine."""

import os
from contextlib import suppress

from ray.cluster_utils import Cluster

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # tests report nothing to anybody

STORE = 100 * 2**20
"""Bytes of each node's object store."""
FAST = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 10}
"""A node whose process was killed is noticed by its closed connection; a busy machine must not lose one that lives."""


class RayCluster:
    """A head without devices, and nodes that are added and killed.

    Args:
        sizes: CPUs of the first nodes.
    """

    def __init__(self, *sizes: int):
        head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False, "_system_config": FAST}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self._cluster.address
        for size in sizes:
            self.add(size)

    def add(self, size: int = 1) -> None:
        """Adds a node and waits until it is up."""
        self._cluster.add_node(num_cpus=size, object_store_memory=STORE)

    def kill(self, node_id: str) -> None:
        """Kills a node: its processes get SIGKILL."""
        (node,) = (each for each in self._cluster.worker_nodes if each.node_id == node_id)
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        """Ends all nodes. It does not wait for processes that take long to end, as on a loaded machine; Ray takes these for zombies."""
        while self._cluster.list_all_nodes():
            with suppress(AssertionError):
                self._cluster.shutdown()
