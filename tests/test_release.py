"""The notes of a release are the changelog's words under its version, and no others."""

import pytest

from tools import release

CHANGELOG = """\
# Changelog

Versions follow [Semantic Versioning](https://semver.org).

## [Unreleased]

## [0.2.0] - 2025-12-31

### Added
- Something, see [here](https://example.org).

## [0.1.0] - unreleased

First.
"""


def test_notes_are_the_section_of_the_version():
    assert release.notes(CHANGELOG, "0.2.0") == "### Added\n- Something, see [here](https://example.org)."
    assert release.notes(CHANGELOG, "0.1.0") == "First."


@pytest.mark.parametrize("version", ["0.3.0", "0.1", "Unreleased"])
def test_a_version_without_notes_is_refused(version):
    with pytest.raises(ValueError, match=f"nothing under .{version}"):
        release.notes(CHANGELOG, version)


def test_what_is_unfinished_is_said():
    assert release.unfinished(CHANGELOG, "0.2.0") == []
    (undated,) = release.unfinished(CHANGELOG, "0.1.0")
    assert "date" in undated
    (waiting,) = release.unfinished(CHANGELOG.replace("[Unreleased]\n", "[Unreleased]\n\nNews.\n"), "0.2.0")
    assert "[Unreleased]" in waiting


def test_notes_of_this_version_are_printed(capsys):
    release.main()
    assert "### Added" in capsys.readouterr().out
