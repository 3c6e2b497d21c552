"""Programs of promises that need emulated devices, which JAX takes from the environment when a process starts."""

import os
import subprocess
import sys


def assert_kept(module: str, *arguments: str, n: int, timeout_s: int = 900) -> None:
    """Runs a module that prints "kept:" for each promise; fails unless it ends well with n of them."""
    command = [sys.executable, "-W", "error", "-m", module, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("kept:") == n, done.stdout
