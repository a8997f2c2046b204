"""A Ray cluster of two nodes with one core each on this machine, until its input ends; prints its address."""

import os
import sys

os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}

from ray.cluster_utils import Cluster  # Ray reads the environment at its import

if __name__ == "__main__":
    node = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 128 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    second = cluster.add_node(**{key: value for key, value in node.items() if key != "include_dashboard"})
    print(f"address {cluster.address} {second.all_processes['raylet'][0].process.pid}", flush=True)
    sys.stdin.read()
    cluster.shutdown()
