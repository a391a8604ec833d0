"""The Python of those pages of the docs that take long to compile."""

import pages
import pytest


@pytest.mark.parametrize("page", [p for p in pages.PAGES if p.name in pages.LONG], ids=lambda p: p.name)
def test_python_of_the_docs_runs(page):
    pages.run(page)


def test_they_are_there():
    assert {p.name for p in pages.PAGES} >= pages.LONG
