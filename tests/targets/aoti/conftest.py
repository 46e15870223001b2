"""Programs with a cache, as they are compiled."""

import pytest

from vlmbuild.ir.serialize import from_json, to_json
from vlmbuild.targets.aoti.plan import cached_programs


@pytest.fixture(scope="session")
def programs(pristine_built):
    """The built program with either form of a cache, with shapes; nobody may change them."""
    return cached_programs(from_json(to_json(pristine_built)))
