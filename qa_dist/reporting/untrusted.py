"""What is shown of files that may be damaged, and of texts that anyone may have written.

Of paths, which are private, only the last part is shown.
"""

import re
import unicodedata
from pathlib import Path
from typing import Any

from huggingface_hub.utils import validate_repo_id

LONGEST_TEXT = 200
"""Characters of an untrusted text that are shown."""


def is_count(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 2**53 for value in values)


def is_number(value: Any) -> bool:
    """Whether tables and plots can show it."""
    return type(value) in (int, float) and -1e15 < value < 1e15  # NaN is not between them either


def plain(value: Any) -> str:
    """One line, without control characters and halves of characters, which YAML and UTF-8 do not have."""
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in str(value)[:LONGEST_TEXT])
    return " ".join(text.split())


def file_name(path: str) -> str:
    """The last part of a path of any system, or of a URL."""
    path = re.split(r"[?#]", path)[0] if "://" in path else path  # behind them stand credentials
    *parents, name = map(plain, re.split(r"[/\\]+", path.rstrip("/\\")))
    is_home = name.startswith("~") or (parents and parents[-1] in ("home", "Users"))  # a user's name
    return "unnamed" if is_home or not name.strip(".") else name


def without_paths(text: str) -> str:
    """`text` with the last part of each path in it alone."""
    return re.sub(r"(?<![\w.:/])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\:;,'\"()]+){2,}", lambda path: file_name(path[0]), text)


def hub_id(name: str | None) -> str | None:
    """`name` if it can be an id on the Hub, whose users have no dots in their names, and is nothing that lies here."""
    try:
        validate_repo_id(name)
        return name if name and "." not in name.rpartition("/")[0] and not Path(name).exists() else None
    except (ValueError, OSError):
        return None
