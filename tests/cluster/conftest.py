"""A cluster of two nodes, and data that both see."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.launches import share
from tests.training.runs import Corpus


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes for all tests of a module."""
    with Cluster(tmp_path_factory.mktemp("cluster"), 2) as made:
        yield made


@pytest.fixture(scope="module")
def shared(corpus: Corpus, cluster: Cluster) -> Corpus:
    """The corpus, where all nodes see it."""
    return share(corpus, cluster)
