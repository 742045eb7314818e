"""What MkDocs does beside its own work: `hooks:` in mkdocs.yml names this file.

1. Pages that lie in the repository's root (CONTRIBUTING.md and the like) become pages of the site.
2. Files that a page links to outside docs/, such as a CSV file of results, come along.
3. `<!-- folders -->` becomes the table of the package's folders, made from their docstrings.
4. `<!-- index -->` becomes a list of the page's headings.
5. Mermaid is copied from an installed package, so no reader fetches it.
"""

import ast
import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
ROOT_PAGES = {"contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md", "changelog.md": "CHANGELOG.md"}
OUTSIDE = re.compile(r"\]\(\.\./(?!\.\.)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the root's pages, and every file that a page links to outside docs/."""
    for page, name in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    linked = {path for page in Path(config.docs_dir).glob("*.md") for path in OUTSIDE.findall(page.read_text(encoding="utf-8"))}
    for path in sorted(linked - set(ROOT_PAGES.values())):
        if not (ROOT / path).is_file():
            raise FileNotFoundError(f"a page links to ../{path}, which is no file of the repository")
        files.append(File.generated(config, f"repository/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill in what is made from the code, and point links at where their files lie in the site."""
    if page.file.src_uri in ROOT_PAGES:
        return markdown.replace("](docs/", "](")
    for target, name in ROOT_PAGES.items():
        markdown = markdown.replace(f"](../{name}", f"]({target}")
    markdown = OUTSIDE.sub(r"](repository/\1", markdown)
    if "<!-- folders -->" in markdown:
        markdown = markdown.replace("<!-- folders -->", folders())
    if "<!-- index -->" in markdown:
        markdown = markdown.replace("<!-- index -->", index(markdown))
    return markdown


def on_post_build(config: Any) -> None:
    """Copy Mermaid's modules into the site."""
    spec = importlib.util.find_spec("nicegui")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("Mermaid is missing: `make docs` installs requirements-docs-assets.txt, which brings it")
    source = Path(spec.origin).parent / "elements" / "mermaid" / "dist"
    shutil.copytree(source, Path(config.site_dir) / "assets" / "mermaid", dirs_exist_ok=True)


def folders() -> str:
    """Return the table of dali_pipeline's folders, in the order in which they may import, with their docstrings."""
    lines = ["| folder | what is in it |", "|---|---|"]
    for name in _order():
        path = ROOT / "dali_pipeline" / name / "__init__.py"
        path = path if path.is_file() else ROOT / "dali_pipeline" / f"{name}.py"
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        paragraph = " ".join(text.split("\n\n")[0].split())
        lines.append(f"| `{name}{'/' if path.name == '__init__.py' else '.py'}` | {paragraph.replace('|', '&#124;')} |")
    return "\n".join(lines)


def _order() -> list[str]:
    """Read the order of the folders where it is defined: in the test that enforces it."""
    tree = ast.parse((ROOT / "tests" / "test_structure.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "FOLDERS":
            order: list[str] = ast.literal_eval(node.value)
            return order
    raise LookupError("tests/test_structure.py no longer has a list FOLDERS; docs/hooks.py reads the folders' order from it")


def index(markdown: str) -> str:
    """Return a list of links to the page's headings of the second level."""
    from markdown.extensions.toc import slugify, unique

    ids: set[str] = set()
    entries = []
    fenced = False
    for line in markdown.splitlines():
        fenced ^= line.startswith("```")
        if fenced or not re.match(r"#{1,6} ", line):
            continue
        level, _, heading = line.partition(" ")
        anchor = unique(slugify(re.sub(r"[`*]", "", heading), "-"), ids)
        if level == "##":
            title = re.sub(r" \((?:[^()]|\([^()]*\))*\)$", "", heading)  # without the machine and the conditions
            entries.append(f"- [{title}](#{anchor})")
    return "\n".join(entries)
