"""A fork server for the tests of survival, and the run that nothing happens to."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from survival_runs import RECIPE, Launch, Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The fork server, with `recipe.yaml` in its folder."""
    folder = tmp_path_factory.mktemp("survival")
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
    server = Server(folder)
    yield server
    server.close()


@pytest.fixture(scope="session")
def whole(server: Server) -> Launch:
    """The run that nothing happens to, in the folder `whole`."""
    done = server.launch("--config", "recipe.yaml", "output_dir=whole")
    assert done.codes == [0, 0], done.logs
    return done
