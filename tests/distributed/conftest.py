from collections.abc import Callable, Iterator

import pytest

from tests.helpers.pool import Pool


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Pool]]:
    """A pool of the given size, started when it is first asked for.

    Not for the session: the threads of all process groups that functions have made poll as long as the pool lives.
    """
    pools: dict[int, Pool] = {}

    def get(size: int) -> Pool:
        if size not in pools or not all(process.is_alive() for process in pools[size].processes):
            pools[size] = Pool(size, tmp_path_factory.mktemp(f"ranks{size}"))
        return pools[size]

    yield get
    for running in pools.values():
        running.close()
