"""Which GPU a process of pytest-xdist takes, where there are several."""

from collections.abc import MutableMapping


def take_one(environment: MutableMapping[str, str]) -> None:
    """Of the GPUs that CUDA_VISIBLE_DEVICES names, the n-th process sees one: the tests are spread over all."""
    worker, gpus = environment.get("PYTEST_XDIST_WORKER", ""), environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if worker.startswith("gw") and len(gpus) > 1:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[int(worker[2:]) % len(gpus)]
