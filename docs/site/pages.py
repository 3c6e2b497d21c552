"""What the site needs beyond the pages of docs: those of the root, tutorials, and links that lead out of it.

Pages link to files of the repository as they are read there. On the site such a link becomes the file's name.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

import tutorials  # MkDocs looks for it beside this file
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
TUTORIALS = {f"tutorials/{path.stem}.md": path for path in sorted((ROOT / "docs/tutorials").glob("*.py"))}
# Page of the site -> file of the repository.
PAGES = {"index.md": "README.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"} | {
    page: str(path.relative_to(ROOT)) for page, path in TUTORIALS.items()
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages of the root, and the tutorials with their pictures."""
    for page, source in PAGES.items():
        content, pictures = (ROOT / source).read_text(), dict[str, bytes]()
        if page in TUTORIALS:
            content, pictures = tutorials.page(TUTORIALS[page], ROOT)
        files.append(File.generated(config, page, content=content))
        for name, picture in pictures.items():
            files.append(File.generated(config, posixpath.join(posixpath.dirname(page), name), content=picture))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Leads links to where their target is on the site, or names the file where it is not."""
    here = PAGES.get(page.file.src_uri)
    folder = posixpath.dirname(here if here else f"docs/{page.file.src_uri}")
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
