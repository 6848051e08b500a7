"""A cluster of two workers on this machine. Skipped without Ray; `.ci/ray-tests` makes an environment that has it."""

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest


def pytest_collection_modifyitems(config, items):
    for item in items:
        if Path(__file__).parent in item.path.parents and find_spec("ray") is None:
            item.add_marker(pytest.mark.skip(reason="needs ray: run .ci/ray-tests"))


@pytest.fixture(scope="session")
def cluster():
    """`ray.data`, of two workers that have the environment of these tests: no network, an empty cache."""
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_DATA_DISABLE_PROGRESS_BARS="1")
    import ray.data

    folder = tempfile.mkdtemp(prefix="ray")  # its sockets want a short name
    options = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 200_000_000}
    ray.init(num_cpus=2, _node_ip_address="127.0.0.1", _temp_dir=folder, **options)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray.data
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
