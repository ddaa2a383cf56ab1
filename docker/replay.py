"""Run the steps of a Dockerfile where there is no Docker engine: `python docker/replay.py docker/Dockerfile.cpu`.

Every absolute path of the image becomes one below a temporary folder; pip, COPY, ENV, ARG and WORKDIR do what they do in a
build, and the last stage keeps only what it copies. Then the image's own command, its health check and a training run
of two steps are started with the image's environment and nothing else. What changes the system (apt-get, useradd) is
listed as skipped, and base images are this machine's Python.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CONTEXT = Path(__file__).resolve().parents[1]
SYSTEM = ("apt-get", "useradd")
IMAGE_PATH = re.compile(r"(?<![\w./$}-])/(opt|src|work|cache)(?=[/\s\"':]|$)")
"""Folders that the images own; `/usr` and the like are the machine's."""


@dataclass(frozen=True)
class Step:
    """One instruction: its keyword in capitals, and the rest of its lines as one."""

    keyword: str
    value: str


def read_steps(text: str) -> Iterator[Step]:
    """Instructions of a Dockerfile; comments and line continuations removed."""
    pending = ""
    for line in text.splitlines():
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        pending += stripped.removesuffix("\\").rstrip() + " "
        if not stripped.endswith("\\"):
            keyword, _, value = pending.strip().partition(" ")
            yield Step(keyword.upper(), value.strip())
            pending = ""


@dataclass
class Image:
    """What a build leaves, on this machine.

    Args:
        root: stands for `/` of the image.
        arguments: build arguments, which beat the Dockerfile's defaults.
        overrides: variables, which beat the Dockerfile's ENV (the cache of pip, say).
    """

    root: Path
    arguments: Mapping[str, str] = field(default_factory=dict)
    overrides: Mapping[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def build(self, steps: Sequence[Step]) -> None:
        """Go through the stages in order."""
        starts = [number for number, step in enumerate(steps) if step.keyword == "FROM"]
        for start, end in zip(starts, [*starts[1:], len(steps)], strict=True):
            stage = steps[start:end]
            kept = [step.value.split()[1] for step in stage if step.value.startswith("--from=")]
            self._keep_only(kept)
            self.variables, self.folder = {}, "/"
            for step in stage:
                getattr(self, f"_{step.keyword.lower()}", self._nothing)(step.value)

    def run(self, command: Sequence[str], **more: str) -> str:
        """Start a command in the finished image; what it printed.

        Raises:
            SystemExit: it failed.
        """
        words = [self._here(word) for word in command]
        return self._start(words, more)

    def _run(self, value: str) -> None:
        if any(re.search(rf"\b{program}\b", value) for program in SYSTEM):
            self.skipped.append(f"RUN {value}")
            return
        self._start(["sh", "-c", self._here(value)], {})

    def _copy(self, value: str) -> None:
        *sources, target = value.split()
        if sources[0].startswith("--from="):
            if not (self.root / sources[1].lstrip("/")).exists():
                raise SystemExit(f"COPY {value}: an earlier stage did not make it")
            return
        place = Path(self._absolute(target))
        for source in sources:
            found = CONTEXT / source
            if found.is_dir():
                shutil.copytree(
                    found, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                goal = place / found.name if target.endswith("/") else place
                goal.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(found, goal)

    def _env(self, value: str) -> None:
        for word in shlex.split(value):
            name, _, content = word.partition("=")
            self.variables[name] = self._here(content.replace("$PATH", self._path()))

    def _arg(self, value: str) -> None:
        name, _, default = value.partition("=")
        self.variables[name] = self.arguments.get(name, default)

    def _workdir(self, value: str) -> None:
        self.folder = value
        Path(self._absolute(value)).mkdir(parents=True, exist_ok=True)

    def _entrypoint(self, value: str) -> None:
        self.entrypoint = json.loads(value)

    def _healthcheck(self, value: str) -> None:
        self.health = json.loads(value.partition("CMD")[2])

    def _user(self, value: str) -> None:
        self.skipped.append(f"USER {value}")

    def _nothing(self, value: str) -> None:
        """FROM, LABEL and CMD change no file."""

    def _keep_only(self, kept: Sequence[str]) -> None:
        for top in self.root.iterdir():
            for place in [top] if top.is_file() else list(top.iterdir()):
                if f"/{place.relative_to(self.root)}" not in kept:
                    shutil.rmtree(place) if place.is_dir() else place.unlink()

    def _start(self, words: Sequence[str], more: Mapping[str, str]) -> str:
        machine = {
            key: os.environ[key]
            for key in ("PIP_CERT", "PIP_FIND_LINKS", "SSL_CERT_FILE")
            if key in os.environ
        }
        environment = {
            "HOME": str(self.root),
            "PATH": self._path(),
            **machine,
            **self.variables,
            **self.overrides,
            **more,
        }
        program = shutil.which(words[0], path=environment["PATH"]) or words[0]
        running = subprocess.Popen(
            [program, *words[1:]],
            cwd=self._absolute(self.folder),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            output, errors = running.communicate()
        except BaseException:
            # The shell's children too, or they write on while the folder is removed.
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
            raise
        if running.returncode != 0:
            raise SystemExit(f"failed with {running.returncode}: {shlex.join(words)}\n{output}\n{errors}")
        return output

    def _path(self) -> str:
        # The base image's `python` is the one that runs this.
        system = f"{sys.base_prefix}/bin:/usr/local/bin:/usr/bin:/bin"
        return self.variables.get("PATH", system)

    def _here(self, text: str) -> str:
        return IMAGE_PATH.sub(lambda found: f"{self.root}{found[0]}", text)

    def _absolute(self, place: str) -> str:
        return f"{self.root}{os.path.normpath(os.path.join(self.folder, place))}"


def _give_up(seconds: int) -> None:
    print(f"given up after {seconds} s: this machine is too slow or too busy to tell")
    sys.exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument(
        "--limit", type=int, default=0, metavar="SECONDS", help="give up then, without a verdict"
    )
    arguments = parser.parse_args()
    start = time.monotonic()
    # Ending by an exception removes the gigabytes of the temporary folder.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    signal.signal(signal.SIGALRM, lambda *_: _give_up(arguments.limit))
    signal.alarm(arguments.limit)
    with tempfile.TemporaryDirectory(prefix="slimfit-image-") as root:
        image = Image(
            Path(root),
            dict(word.split("=", 1) for word in arguments.build_arg),
            # The cache makes a second replay quick, and nobody imports from this image often.
            {"PIP_NO_CACHE_DIR": "0", "PIP_NO_COMPILE": "1"},
        )
        image.build(list(read_steps(arguments.dockerfile.read_text(encoding="utf-8"))))
        print(f"installed in {time.monotonic() - start:.0f} s; skipped: {'; '.join(image.skipped)}")
        offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        print(image.run([*image.entrypoint, "--help"], **offline).splitlines()[0])
        print(image.run(image.health, **offline).splitlines()[-1])
        print(image.run([*image.entrypoint, "doctor", "--time-limit", "60"], **offline))
        recipe = ["--config", "/opt/slimfit/recipes/digits_vit.yaml", "output_dir=/work/outputs/trial"]
        few = ["max_steps=2", "max_eval_examples=20", "save_model=false"]
        print(image.run([*image.entrypoint, "train", *recipe, *few], **offline))
        # All is said; what follows only tidies up.
        signal.alarm(0)
    print(f"{arguments.dockerfile}: replayed in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
