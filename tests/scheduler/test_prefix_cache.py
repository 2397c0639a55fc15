import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexjax.scheduler.page_pool import PagePool
from flexjax.scheduler.prefix_cache import PrefixCache, page_content


def fill(cache, version, tokens):
    """Computes all full pages of ``tokens``, publishes them and lets go; the pages used."""
    pages = cache.pool.allocate(len(tokens) // 64)
    parent = None
    for index, page in enumerate(pages):
        parent = cache.publish(version, parent, page_content(tokens, index), page)
    cache.release(pages)
    return pages


def test_longest_run_of_full_pages_but_never_the_whole_prompt():
    cache = PrefixCache(PagePool(8))
    tokens = list(range(200))
    pages = fill(cache, 0, tokens)
    assert [entry.page for entry in cache.match(0, tokens)] == list(pages)
    assert [entry.page for entry in cache.match(0, tokens[:193])] == list(pages)
    assert [entry.page for entry in cache.match(0, tokens[:192])] == list(pages[:2])
    assert cache.match(0, tokens[:64]) == []
    assert cache.match(0, [7] + tokens[1:]) == []
    assert len(cache.match(0, tokens[:100] + [7] * 100)) == 1


def test_a_salt_keeps_a_whole_chain_apart():
    """Later pages have no salt of their own, but a parent that is another's."""
    assert page_content(range(200), 0, "ann") != page_content(range(200), 0, "bob") != page_content(range(200), 0)
    cache = PrefixCache(PagePool(6))
    tokens = list(range(130))
    (first, second), parent = cache.pool.allocate(2), None
    for index, page in enumerate((first, second)):
        parent = cache.publish(0, parent, page_content(tokens, index, "ann"), page)
    assert [entry.page for entry in cache.match(0, tokens, "ann")] == [first, second]
    assert cache.match(0, tokens, "bob") == cache.match(0, tokens) == []
    cache.publish(0, None, page_content(tokens, 0, "bob"), cache.pool.allocate(1)[0])
    assert len(cache.match(0, tokens, "bob")) == 1, "the second page was computed after another's first"


def test_versions_do_not_mix_and_can_be_forgotten():
    cache = PrefixCache(PagePool(4))
    tokens = list(range(130))
    fill(cache, 1, tokens)
    assert cache.match(2, tokens) == []
    fill(cache, 2, tokens)
    cache.forget(1)
    assert cache.match(1, tokens) == []
    assert len(cache.match(2, tokens)) == 2
    assert (cache.pool.free, cache.spare) == (2, 2)


def test_forgetting_pages_in_use_leaves_them_to_their_holder():
    cache = PrefixCache(PagePool(2))
    tokens = list(range(65))
    fill(cache, 1, tokens)
    (page,) = cache.hold(cache.match(1, tokens))
    cache.forget(1)
    assert cache.pool.references(page) == 1
    cache.release((page,))
    assert cache.pool.free == 2


def test_evicts_the_least_recently_used_and_chains_from_their_end():
    cache = PrefixCache(PagePool(4))
    old, new = list(range(130)), list(range(500, 630))
    fill(cache, 0, old)
    fill(cache, 0, new)
    assert cache.evict(1) == 1
    assert (len(cache.match(0, old)), len(cache.match(0, new))) == (1, 2)
    cache.release(cache.hold(cache.match(0, old)))
    assert cache.evict(2) == 2
    assert (len(cache.match(0, old)), len(cache.match(0, new))) == (1, 0)
    assert cache.evict(9) == 1
    assert cache.pool.free == 4


def test_pages_in_use_are_not_evicted():
    cache = PrefixCache(PagePool(2))
    tokens = list(range(65))
    fill(cache, 0, tokens)
    held = cache.hold(cache.match(0, tokens))
    assert cache.evict(2) == 0
    cache.release(held)
    assert cache.evict(2) == 1


def test_equal_content_is_cached_once():
    cache = PrefixCache(PagePool(4))
    tokens = list(range(128))
    first = fill(cache, 0, tokens)
    fill(cache, 0, tokens)
    assert cache.pages == 2
    assert [entry.page for entry in cache.match(0, [*tokens, 1])] == list(first)


def test_nothing_is_published_behind_an_evicted_parent():
    cache = PrefixCache(PagePool(2))
    pages = cache.pool.allocate(2)
    parent = cache.publish(0, None, (1,) * 64, pages[0])
    cache.release(pages[:1])
    cache.evict(1)
    assert cache.publish(0, parent, (2,) * 64, pages[1]) is None


SEQUENCES = st.tuples(st.integers(0, 1), st.lists(st.sampled_from((3, 4)), min_size=1, max_size=4))


@pytest.mark.parametrize("digest", [hash, lambda key: 0, lambda key: hash(key) % 2], ids=["hash", "constant", "bit"])
@settings(max_examples=60, deadline=None)
@given(sequences=st.lists(SEQUENCES, max_size=8))
def test_a_hash_collision_never_serves_a_wrong_page(digest, sequences):
    """Each page is labelled with what was computed in it; whatever the hash does, a match has the right labels."""
    cache = PrefixCache(PagePool(64), digest)
    labels = {}
    for version, words in sequences:
        tokens = [word for word in words for _ in range(64)]
        for index, entry in enumerate(cache.match(version, [*tokens, 0])):
            assert labels[entry.page] == (version, tuple(words[: index + 1]))
        for index, page in enumerate(fill(cache, version, tokens)):
            labels[page] = (version, tuple(words[: index + 1]))
        assert cache.pool.free + cache.spare == 64
