"""Text that a page can hold."""

from __future__ import annotations

import re

_NOT_FOR_PAGES = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def for_pages(text: str) -> str:
    """The text without what neither HTML nor UTF-8 can hold, such as lone surrogates."""
    return _NOT_FOR_PAGES.sub("\N{REPLACEMENT CHARACTER}", text)
