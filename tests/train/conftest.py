import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where all jobs of these tests keep their warm-started models."""
    return tmp_path_factory.mktemp("cache")
