"""A tenth of the zoo; `make zoo` runs all of it."""

import pytest
from zoo import result_of
from zoo_cases import OWN, QUICK


@pytest.mark.parametrize(("name", "cut"), [(n, cut) for n in QUICK for cut in OWN[n].cuts])
def test_split_equals_whole(name, cut):
    result = result_of(OWN[name], cut)
    assert result.startswith("refused" if cut in OWN[name].refused else "exact"), result
