"""What the site needs beyond the pages of docs: those of the root, and links that lead out of it.

Pages link to files of the repository as they are read there. On the site such a link becomes the file's name.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
# Page of the site -> file of the root.
PAGES = {"index.md": "README.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages of the root."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Leads links to where their target is on the site, or names the file where it is not."""
    here = PAGES.get(page.file.src_uri)
    folder = "" if here else posixpath.dirname(f"docs/{page.file.src_uri}")
    pages = {source: name for name, source in PAGES.items()}

    def moved(match: re.Match[str]) -> str:
        image, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        if "://" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if not (ROOT / path).exists():
            return match[0]  # MkDocs says that it leads nowhere
        name = pages.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if name is None or files.get_file_from_path(name) is None:
            return f"{text} (`{path}`)" if text.strip("`") != path else text
        start = posixpath.dirname(page.file.src_uri) or "."
        return f"{image}[{text}]({posixpath.relpath(name, start)}{anchor})"

    return _LINK.sub(moved, markdown)
