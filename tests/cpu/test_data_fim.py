"""Fill-in-the-middle: what is cut, where, and that nothing gets lost."""

from hypothesis import given
from hypothesis import strategies as st

from deepseek_train.data.fim import choose_cut


@given(text=st.text(max_size=60), name=st.text(max_size=10), seed=st.integers(0, 99))
def test_the_pieces_are_the_text(text: str, name: str, seed: int) -> None:
    cut = choose_cut(name, len(text), 1.0, seed)
    assert cut is not None
    prefix, suffix, middle = cut.pieces(text)
    assert prefix + middle + suffix == text


def test_a_tenth_of_the_documents_is_cut() -> None:
    share = sum(choose_cut(f"file{number}", 1000, 0.1, 0) is not None for number in range(20_000)) / 20_000
    assert abs(share - 0.1) < 0.01
    assert all(choose_cut(f"file{number}", 1000, 0.0, 0) is None for number in range(1000))


def test_cuts_reach_everywhere_and_depend_on_name_and_seed_only() -> None:
    found = [choose_cut(f"file{number}", 9, 1.0, 0) for number in range(2000)]
    assert {(cut.start, cut.end) for cut in found if cut} == {(a, b) for a in range(10) for b in range(a, 10)}
    assert found == [choose_cut(f"file{number}", 9, 1.0, 0) for number in range(2000)]
    assert found != [choose_cut(f"file{number}", 9, 1.0, 1) for number in range(2000)]
