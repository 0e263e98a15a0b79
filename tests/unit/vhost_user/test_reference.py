"""docs/vhost-user.md shows the table that the code follows."""

from pathlib import Path

import pytest

from viaduct.vhost_user.reference import BEGIN, END, main, replaced, table

PAGE = Path(__file__).parents[3] / "docs" / "vhost-user.md"


def test_the_page_is_current() -> None:
    assert main([str(PAGE), "--check"]) == 0


def test_a_page_that_is_not_current_is_found_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main([str(page), "--check"]) == 1
    assert "run: python -m" in capsys.readouterr().out
    assert main([str(page)]) == 0
    assert main([str(page), "--check"]) == 0
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
    assert table() in page.read_text()


def test_a_page_without_markers() -> None:
    with pytest.raises(ValueError, match="lacks the line"):
        replaced("nothing here")
