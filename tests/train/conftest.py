import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where jobs keep their warm-started models: tiny ones here, those of the stand-ins below."""
    return tmp_path_factory.mktemp("cache")
