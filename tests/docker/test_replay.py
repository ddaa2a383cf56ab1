"""The stand-in for a Docker engine (`docker/replay.py`): it does what the steps say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "docker"))
import replay
from replay import Image, Step, read_steps


def test_steps_of_a_file():
    text = '# syntax\nFROM a AS build\nRUN one \\\n    && two\n\n# hadolint ignore=X\nENV A=1 \\\n  B=2\ncmd ["x"]\n'
    assert list(read_steps(text)) == [
        Step("FROM", "a AS build"),
        Step("RUN", "one && two"),
        Step("ENV", "A=1 B=2"),
        Step("CMD", '["x"]'),
    ]


@pytest.fixture
def context(tmp_path, monkeypatch) -> Path:
    (tmp_path / "context" / "package").mkdir(parents=True)
    (tmp_path / "context" / "package" / "code.txt").write_text("code")
    (tmp_path / "context" / "list.txt").write_text("list")
    (tmp_path / "image").mkdir()
    monkeypatch.setattr(replay, "CONTEXT", tmp_path / "context")
    return tmp_path


DOCKERFILE = """
FROM base AS build
ARG COLOUR=red
WORKDIR /src
COPY list.txt ./
COPY package ./package
RUN mkdir -p /opt/venv/bin && cp list.txt /opt/venv/$COLOUR && cp package/code.txt /opt/venv \\
    && printf '#!/bin/sh\\necho "$@" in "$PLACE"; pwd' > /opt/venv/bin/tool && chmod +x /opt/venv/bin/tool
ENV LEFT=behind

FROM base
RUN useradd somebody && touch /work/never
COPY --from=build /opt/venv /opt/venv
COPY package /opt/data
ENV PATH=/opt/venv/bin:$PATH PLACE=/cache/models
WORKDIR /work
USER 10001
HEALTHCHECK --interval=5m CMD ["tool", "health"]
ENTRYPOINT ["tool"]
CMD ["--help"]
"""


def test_the_last_stage_holds_what_it_copies_and_nothing_else(context):
    image = Image(context / "image", arguments={"COLOUR": "blue"})
    image.build(list(read_steps(DOCKERFILE)))
    files = {str(path.relative_to(image.root)) for path in image.root.rglob("*") if path.is_file()}
    assert files == {"opt/venv/blue", "opt/venv/code.txt", "opt/venv/bin/tool", "opt/data/code.txt"}
    assert image.skipped == ["RUN useradd somebody && touch /work/never", "USER 10001"]
    assert "LEFT" not in image.variables


def test_commands_see_the_image_s_folders_and_environment(context, monkeypatch):
    monkeypatch.setenv("PLACE", "of the machine")
    image = Image(context / "image")
    image.build(list(read_steps(DOCKERFILE)))
    said = image.run([*image.entrypoint, "/work/x"]).splitlines()
    assert said == [f"{image.root}/work/x in {image.root}/cache/models", f"{image.root}/work"]
    assert image.run(image.health).startswith("health")


def test_a_step_that_fails_and_a_stage_without_what_is_copied(context):
    with pytest.raises(SystemExit, match="failed with 3"):
        Image(context / "image").build(list(read_steps("FROM a\nRUN exit 3\n")))
    with pytest.raises(SystemExit, match="an earlier stage did not make it"):
        Image(context / "image").build(list(read_steps("FROM a\nCOPY --from=build /opt/x /opt/x\n")))
