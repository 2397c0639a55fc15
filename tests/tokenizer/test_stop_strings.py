"""Stop strings: the result depends on the text alone, not on the pieces it came in."""

from hypothesis import given
from hypothesis import strategies as st

from flexjax.tokenizer import StopMatcher

LETTERS = "ab\n"


def first_complete(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """(start, end, stop): shortest text that ends with a stop string, longest such string; by trying every end."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return end - len(longest), end, longest
    return None


@given(
    st.lists(st.text(LETTERS, max_size=4), max_size=8),
    st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_pieces_stop_where_the_whole_text_stops(pieces, stops, include):
    matcher = StopMatcher(tuple(stops), include)
    shown = "".join([*(matcher.push(piece) for piece in pieces), matcher.flush()])
    text, found = "".join(pieces), first_complete("".join(pieces), stops)
    if found is None:
        assert (shown, matcher.matched) == (text, None)
    else:
        start, end, stop = found
        assert (shown, matcher.matched) == (text[: end if include else start], stop)


@given(st.text(LETTERS, max_size=12), st.lists(st.text(LETTERS, min_size=1, max_size=4), min_size=1, max_size=3))
def test_only_what_may_begin_a_stop_string_is_held_back(text, stops):
    matcher = StopMatcher(tuple(stops))
    shown = matcher.push(text)
    if matcher.matched is None:
        held = text[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_without_stop_strings_nothing_is_held_back():
    matcher = StopMatcher()
    assert [matcher.push("a"), matcher.push("\n"), matcher.flush(), matcher.matched] == ["a", "\n", "", None]
