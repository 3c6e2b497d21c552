"""Runs `host_<name>.py` of each host, or of those named, in the environment that hosts.toml pins.

    python -m tests.integrations [--only-install] [host ...]

Standard library alone: it runs before anything is installed. An environment lies in .venv-integrations/<host>, is made
anew when its pins change, and knows hisa_jax by its checkout.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
import tomllib
import venv

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
ENVIRONMENTS = ROOT / ".venv-integrations"


def main() -> int:
    hosts = tomllib.loads((HERE / "hosts.toml").read_text())
    parser = argparse.ArgumentParser(prog="python -m tests.integrations")
    parser.add_argument("--only-install", action="store_true", help="make the environments and run nothing")
    parser.add_argument("hosts", nargs="*", metavar="host", help=f"of {', '.join(hosts)}; all by default")
    arguments = parser.parse_args()
    if unknown := set(arguments.hosts) - set(hosts):
        parser.error(f"no such host: {', '.join(sorted(unknown))}; there are {', '.join(hosts)}")
    results = []
    for host in arguments.hosts or hosts:
        start = time.monotonic()
        try:
            install(host, hosts[host])
        except subprocess.CalledProcessError as error:  # the next one may do
            print(f"{host}: {error}", file=sys.stderr)
            results.append((host, "not installed", time.monotonic() - start, 0.0))
            continue
        installed = time.monotonic()
        verdict = "installed" if arguments.only_install else "failed" if run(host) else "passed"
        results.append((host, verdict, installed - start, time.monotonic() - installed))
    for host, verdict, to_install, to_run in results:
        print(f"{host:20} {verdict:14} installed in {to_install:4.0f} s, run in {to_run:4.0f} s")
    return int(any(verdict in ("failed", "not installed") for _, verdict, _, _ in results))


def install(host: str, pins: dict) -> None:
    """Makes the host's environment unless the one that is there has these pins."""
    home = ENVIRONMENTS / host
    stamp = home / "pins.json"
    wanted = json.dumps({name: pins.get(name) for name in ("packages", "alone", "git", "commit", "files")})
    if stamp.exists() and stamp.read_text() == wanted:
        return
    shutil.rmtree(home, ignore_errors=True)
    venv.create(home, with_pip=True)
    pip = [python(host), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if packages := pins.get("packages"):
        subprocess.run([*pip, *packages], check=True)
    if alone := pins.get("alone"):
        subprocess.run([*pip, "--no-deps", *alone], check=True)
    if repository := pins.get("git"):
        # Of one commit these files alone, without the history.
        git = ["git", "-c", "gc.auto=0", "-C", str(home / "source")]
        subprocess.run(["git", "init", "--quiet", str(home / "source")], check=True)
        subprocess.run([*git, "remote", "add", "origin", repository], check=True)
        fetch = ["fetch", "--quiet", "--depth", "1", "--filter=blob:none", "origin", pins["commit"]]
        subprocess.run([*git, *fetch], check=True)
        subprocess.run([*git, "checkout", "--quiet", pins["commit"], "--", *pins["files"]], check=True)
    stamp.write_text(wanted)


def run(host: str) -> int:
    """pytest's exit code; that there is no test is a failure, too."""
    settings = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [python(host), "-m", "pytest", "-c", str(HERE / "pytest.ini"), str(HERE / f"host_{host}.py")]
    print(f"== {host}", flush=True)
    return subprocess.run(command, env={**os.environ, **settings}, cwd=ROOT).returncode


def python(host: str) -> str:
    return str(ENVIRONMENTS / host / "bin" / "python")


if __name__ == "__main__":
    sys.exit(main())
