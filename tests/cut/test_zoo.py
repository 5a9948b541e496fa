"""A tenth of the zoo; `make zoo` runs all of it."""

import pytest
from zoo import GROUPS, judged
from zoo_cases import QUICK


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("group", "name"), [(g, name) for g, names in QUICK.items() for name in names]
)
def test_split_equals_whole(group, name):
    case = GROUPS[group]()[name]
    for cut in case.cuts:
        result = judged(case, cut)
        assert result.partition(":")[0] in ("exact", "refused"), (cut, result)
