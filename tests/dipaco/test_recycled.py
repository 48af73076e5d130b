"""Memory of large states that is used again."""

from dipaco.recycled import MAX_SPARE, recycled

SIZE = 2**20 + 8


def test_memory_comes_back_only_when_nothing_shows_it_any_more() -> None:
    first = recycled(SIZE)
    first[:] = 7
    view = first[10:20].data
    address = first.ctypes.data
    del first
    other = recycled(SIZE)
    assert other.ctypes.data != address, "a view still shows it"
    other[:] = 1
    assert bytes(view) == bytes([7] * 10)
    del view
    assert address in {block.ctypes.data for block in [recycled(SIZE) for _ in range(MAX_SPARE)]}
