from vlafit.datasets.lru import LruCache


def test_the_least_recently_used_value_is_dropped_first():
    dropped: list[tuple[str, int]] = []
    cache: LruCache[str, int] = LruCache(2, drop=lambda key, value: dropped.append((key, value)))
    cache.get("a", lambda: 1)
    cache.get("b", lambda: 2)
    assert cache.get("a", lambda: 9) == 1  # kept, and now the newest
    cache.get("c", lambda: 3)
    assert dropped == [("b", 2)] and len(cache) == 2
    cache.clear()
    assert dropped == [("b", 2), ("a", 1), ("c", 3)] and len(cache) == 0


def test_sizes_are_summed_and_the_least_number_of_values_is_kept_whatever_their_size():
    cache: LruCache[str, bytes] = LruCache(10, size=len, least=2)
    for key in "abc":
        cache.get(key, lambda: bytes(8))
    assert len(cache) == 2
    cache.forget(lambda key: key == "b")
    cache.get("d", lambda: bytes(1))
    cache.get("e", lambda: bytes(1))
    assert len(cache) == 3  # c, d and e are 10 bytes


def test_a_value_that_cannot_be_made_leaves_the_cache_as_it_was():
    cache: LruCache[str, int] = LruCache(2)
    try:
        cache.get("a", lambda: 1 // 0)
    except ZeroDivisionError:
        pass
    assert len(cache) == 0 and cache.get("a", lambda: 1) == 1
