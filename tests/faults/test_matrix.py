"""Claims about docs/reliability.md."""

from faults.matrix import DOCUMENT, NOT_SEEN, rows, table_of


def test_every_row_of_the_document_has_its_test_and_every_test_its_row():
    told = {test: (injected, must) for test, (injected, must, _) in table_of(DOCUMENT.read_text()).items()}
    assert told == {row.test: (row.injected, row.must) for row in rows()}, "run python tests/faults/matrix.py"


def test_every_row_tells_what_was_seen():
    assert not [test for test, (_, _, seen) in table_of(DOCUMENT.read_text()).items() if seen == NOT_SEEN]
