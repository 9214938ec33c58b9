"""Follows the README word for word in an empty folder with an empty environment. ``make readme`` runs it; ``--all`` includes ``make test``.

Replaced are the repository's address, by the last commit of this repository, the hubs, by a server on this machine that has the
model ``demo`` under the name of the 5b, and what :mod:`.support.readme` lists. What a user has before the first line is made
first: a folder of ComfyUI, and its Python with torch.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .support import readme
from .support.hub_server import serving

LIMIT = 1800
"""Seconds that a command may take; the longest one installs torch."""
PASSED_ON = ("PIP_", "UV_", "SSL_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "GOMP_")
"""What of the environment stays: how packages are reached, and threads that do not spin."""
BACKGROUND = "serve"
"""The command that runs until ``stop`` ends it."""


class Follower:
    """Runs commands in an environment that has nothing but a Python.

    Args:
        folder: an empty folder.
        hub: the address of the hub.
    """

    def __init__(self, folder: Path, hub: str):
        self.folder, self.failed = folder, []
        self.pack = folder / "ComfyUI" / "custom_nodes" / "ComfyUI-CogVideoX-xDiT"
        (address,) = {match[0] for match in readme.ADDRESS.finditer(readme.text()) if match[1] == self.pack.name}
        self.environment = {
            **{name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)},
            "PATH": f"{folder}/python/bin:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(folder / "home"),
            "XDIT_RUNTIME_DIR": str(folder / "run"),
            "LANG": "C.UTF-8",
            "HF_ENDPOINT": hub,
            "MODELSCOPE_ENDPOINT": hub,
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.file://{readme.REPO}.insteadOf",
            "GIT_CONFIG_VALUE_0": address,
        }

    def follow(self, command: str, where: Path) -> None:
        """Runs a command, and says how it ended and how long it took."""
        print(f"$ {command}", flush=True)
        began = time.monotonic()
        done = subprocess.run(
            ["bash", "-e", "-c", command],
            cwd=where,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT,
        )
        last = "\n    ".join(done.stdout.strip().splitlines()[-20 if done.returncode else -1 :])
        print(f"    {last}\n    status {done.returncode}, {time.monotonic() - began:.0f} s", flush=True)
        if done.returncode:
            self.failed.append(command)

    def prepare(self, torch: str) -> None:
        """Makes what a user has before the first line."""
        for name in ("ComfyUI/custom_nodes", "ComfyUI/models", "home", "run"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "run").chmod(0o700)
        subprocess.run([sys.executable, "-m", "venv", self.folder / "python"], check=True)
        self.follow(f"pip install -q {torch}", self.folder)

    def serve(self, words: list[str]) -> subprocess.Popen:
        """Starts the command that runs until ``stop``, and waits until ``status`` shows its group."""
        print(f"$ {shlex.join(words)} &", flush=True)
        log = (self.folder / "serve.log").open("w")
        server = subprocess.Popen(words, cwd=self.pack, env=self.environment, stdout=log, stderr=log)
        until = time.monotonic() + LIMIT / 4
        while server.poll() is None and time.monotonic() < until and "serving plan" not in Path(log.name).read_text():
            time.sleep(1)
        print(f"    {Path(log.name).read_text().strip()}")
        if server.poll() is not None:
            self.failed.append(shlex.join(words))
        return server


def main() -> int:
    """Follows the README. Returns the exit status: 1 if a command failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="run make test too, which takes a quarter of an hour on two cores")
    parser.add_argument(
        "--torch", default="torch triton", help="what ComfyUI's Python has (a CPU build of torch comes without triton)"
    )
    args = parser.parse_args()
    folder, began = Path(tempfile.mkdtemp(prefix="readme-")), time.monotonic()
    try:
        with serving(readme.REPO / "parallel_backend" / "checkpoints" / "demo") as (_, address):
            follower = Follower(folder, address)
            follower.prepare(args.torch)
            follow_all(follower, runs_tests=args.all)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{len(follower.failed)} commands failed, {time.monotonic() - began:.0f} s")
    return bool(follower.failed)


def follow_all(follower: Follower, *, runs_tests: bool) -> None:
    """Follows the blocks in turn, and then the commands in the middle of the text, in the pack's folder."""
    install, *blocks = readme.blocks()
    follower.follow("\n".join(install), follower.folder)
    pack = follower.pack
    shutil.copy(pack / "docs" / "icon.png", pack / "start.png")
    (pack / "prompts.txt").write_text("a red circle\na blue square\n")
    servers = []
    for command in [command for block in blocks for command in block] + readme.inline():
        words = readme.possible_here(command)
        if words == ["make", "test"] and not runs_tests:
            words.insert(1, "--dry-run")
        if words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
            continue  # for developers: it needs what `make demo` installs, and may take an hour
        if BACKGROUND in words:
            servers.append(follower.serve(words))
        else:
            follower.follow(shlex.join(words), pack)
    follower.follow("python -m parallel_backend stop", pack)
    for server in servers:
        server.wait(LIMIT / 10)
    follower.follow(f"test -s {pack}/output/t2v.mp4 && ls -l {pack}/*.mp4", pack)
    follower.follow("cogvideox-xdit plan --model 5b", follower.folder)


if __name__ == "__main__":
    sys.exit(main())
