"""The small world: pictures of coloured shapes, an exact counter, a held-out judge, and where the files are."""
