"""Runs real clients against `onekernel serve` with a scripted model: each is given a task that needs one tool call.

    python tests/clients/run.py                      # all that can be installed here
    python tests/clients/run.py codex pi --record    # two of them, and keep their requests as fixtures

Each client is installed on first use, in the version that is written below, from the npm registry or PyPI, into a
folder of its own (--prefix). It is started by `onekernel launch`, with an empty environment, a home of its own and a
time limit, and everything it sends goes through a recorder to the server on the loopback interface. Of each run is
asserted: the exit code, the file that the tool call makes, the answer, the number of requests, and that nothing is left
in the home. Needs Linux, npm, and 4 GB of disk (Open WebUI alone 1.6 GB).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import open_webui
from cleaning import write_fixture
from recorder import Recorder
from scripted_agent import DONE

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NODE = "node@24"  # OpenClaw needs 24.16, Claude Code 22
TASK = "Make a file with the shell, then say that you are done."


@dataclass(frozen=True)
class Real:
    """One client, as it is installed and started here.

    Attributes:
        package: with its version; of npm, or of PyPI.
        arguments: those of `onekernel launch NAME --`, after which the client works without a person.
        posts: requests for answers that the task takes.
        limit_s: seconds that it may take.
    """

    package: str
    registry: str
    arguments: tuple[str, ...]
    posts: int
    limit_s: int = 120


REAL = {
    "codex": Real(
        "@openai/codex@0.169.0",
        "npm",
        ("exec", "--skip-git-repo-check", "--json", "-c", "sandbox_mode=danger-full-access", TASK),
        2,
    ),
    "claude": Real(
        "@anthropic-ai/claude-code@2.1.330",
        "npm",
        ("-p", TASK, "--output-format", "json", "--allowedTools", "Bash"),
        2,
    ),
    # One of the requests asks for a title.
    "opencode": Real("opencode-ai@1.18.33", "npm", ("run", "--format", "json", TASK), 3),
    "pi": Real("@earendil-works/pi-coding-agent@0.87.1", "npm", ("-p", "--mode", "json", "--no-session", TASK), 2),
    "qwen": Real("@qwen-code/qwen-code@0.24.4", "npm", ("-p", TASK, "--approval-mode", "yolo"), 2),
    "hermes": Real(
        "hermes-agent==0.19.0",
        "pypi",
        ("chat", "--quiet", "--accept-hooks", "--yolo", "--max-turns", "5", "--query", TASK),
        2,
    ),
    "openclaw": Real(
        "openclaw@2026.9.6",
        "npm",
        ("agent", "--local", "--json", "--session-id", "t1", "--timeout", "150", "--message", TASK),
        2,
        limit_s=180,
    ),
    "openwebui": Real("open-webui==0.12.4", "pypi", ("serve", "--host", "127.0.0.1", "--port"), 2, limit_s=300),
}


class Failed(Exception):
    """What was not as it must be."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="CLIENT", help=f"of {', '.join(REAL)} (default: all)")
    parser.add_argument("--prefix", type=Path, default=Path.home() / ".cache" / "onekernel" / "clients")
    parser.add_argument("--record", action="store_true", help="write the requests to tests/clients/fixtures")
    arguments = parser.parse_args()
    failures = 0
    for name in arguments.names or REAL:
        began = time.monotonic()
        try:
            paths = install(name, arguments.prefix)
            seconds = run(name, paths, arguments.prefix, arguments.record)
            print(f"passed  {name:<10} {REAL[name].package:<42} {seconds:6.1f} s", flush=True)
        except Failed as error:
            failures += 1
            print(f"FAILED  {name:<10} {REAL[name].package:<42} {time.monotonic() - began:6.1f} s\n{error}", flush=True)
    return 1 if failures else 0


# ---- installing


def install(name: str, prefix: Path) -> list[Path]:
    """The folders of the programs of a client, installed if they are not there. Raises Failed."""
    real = REAL[name]
    folder = prefix / f"{name}-{real.package.rpartition('@' if real.registry == 'npm' else '=')[2]}"
    if real.registry == "npm":
        node = prefix / "node"
        if not node.exists():
            _command("npm", "install", "--no-fund", "--no-audit", "--prefix", str(node), NODE)
        paths = [folder / "node_modules" / ".bin", node / "node_modules" / "node" / "bin"]
        if not folder.exists():
            path = {"PATH": f"{paths[1]}{os.pathsep}{os.environ['PATH']}"}
            _command("npm", "install", "--no-fund", "--no-audit", "--prefix", str(folder), real.package, **path)
        return paths
    if not folder.exists():
        _command(sys.executable, "-m", "venv", str(folder))
        pip = (str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet")
        if name == "openwebui":
            _command(*pip, "--upgrade", "pip")
            open_webui.install(folder, real.package, lambda *command: _command(*command))
        else:
            _command(*pip, real.package)
    return [folder / "bin"]


def _command(*command: str, **environment: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


# ---- running


def run(name: str, paths: list[Path], prefix: Path, record: bool) -> float:
    """Seconds that the task took. Raises Failed."""
    # Not in the system's temporary folder: Codex refuses to put its helpers there.
    home = Path(tempfile.mkdtemp(prefix=f"home-{name}-", dir=prefix))
    work = home / "work"
    work.mkdir()
    made = work / "made.txt"
    try:
        with served(made, home) as port:
            recorder = Recorder(port)
            environment = {
                "HOME": str(home),
                "PATH": os.pathsep.join([*map(str, paths), "/usr/local/bin", "/usr/bin", "/bin"]),
                "LANG": "C.UTF-8",
                "PYTHONPATH": str(ROOT),
                # OpenCode and Hermes install more when they start; nothing but the server is to be asked here.
                "npm_config_registry": "http://127.0.0.1:9",
                "PIP_NO_INDEX": "1",
            }
            began = time.monotonic()
            launch = [sys.executable, "-m", "onekernel", "launch", name, "--url", recorder.url, "--"]
            operate: Callable[..., str] = open_webui.operate if name == "openwebui" else _wait
            output = operate(launch, REAL[name], environment, work)
            seconds = time.monotonic() - began
            recorder.close()
        _check(name, output, made, recorder)
        _check_left(home, work)
        if record:
            write_fixture(name, REAL[name].package, recorder.requests, {str(home): "/home/user"})
        return seconds
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _wait(launch: list[str], real: Real, environment: dict[str, str], work: Path) -> str:
    """The output of a client that ends by itself."""
    process = subprocess.Popen(
        [*launch, *real.arguments],
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=real.limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise Failed(f"not done after {real.limit_s} s\n{output[-3000:]}") from None
    if process.returncode:
        raise Failed(f"exit code {process.returncode}\n{output[-3000:]}")
    return output


def _check(name: str, output: str, made: Path, recorder: Recorder) -> None:
    posts = [request["path"] for request in recorder.requests if request["method"] == "POST"]
    told = f"posts: {posts}\n{output[-3000:]}"
    if not made.is_file():
        raise Failed(f"the tool call did not make its file\n{told}")
    if DONE not in output:
        raise Failed(f"the answer {DONE!r} is not in the output\n{told}")
    if len(posts) != REAL[name].posts:
        raise Failed(f"{len(posts)} posts instead of {REAL[name].posts}\n{told}")


def _check_left(home: Path, work: Path) -> None:
    """The user's home is as it was: no configuration, no session, no cache."""
    left = [path for path in home.rglob("*") if path.is_file() and path.parent != home and work not in path.parents]
    if left:
        raise Failed(f"files were left in the home: {', '.join(str(path.relative_to(home)) for path in left[:5])}")


@contextmanager
def served(made: Path, folder: Path) -> Iterator[int]:
    """The port of a server with the scripted model. Raises Failed if its log shows an error."""
    log = folder / "server.log"
    command = [sys.executable, str(HERE / "scripted_agent.py"), str(made), "--port", "0"]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert process.stdout is not None
        try:
            line = process.stdout.readline()  # "serving demo on http://127.0.0.1:PORT"
            if not line:
                raise Failed(f"the server did not start\n{log.read_text()}")
            yield int(line.rpartition(":")[2])
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
    if "Traceback" in log.read_text():
        raise Failed(f"the server failed\n{log.read_text()[-3000:]}")


if __name__ == "__main__":
    sys.exit(main())
