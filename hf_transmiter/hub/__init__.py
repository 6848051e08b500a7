"""Files and repositories: read, checked, described by a card, pushed. Knows files, never models.

In reading order: `files` (places that are claimed, writing in one step, checked reading), `checks` and `rules` (what
is refused), `repo` (a folder or the Hub), `provenance` (versions, where data came from), `adapter_files` (what an
adapter is on disk), `scores` (their tables and files), `card` and `card_text` (the README of what is shared), `push`.
"""
